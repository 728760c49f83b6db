"""Block sizes of `topk_codes`."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from ..architectures import INTERPRETED, architecture


@dataclass(frozen=True)
class TopkConfig:
    """Tiles of BLOCK_N vectors by BLOCK_K codes, BLOCK_D features at a time."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int

    def padded(self, num_features: int) -> int:
        """D rounded up to whole blocks."""
        return -(-num_features // self.block_d) * self.block_d


def on_chip_config(num_features: int, num_codes: int) -> TopkConfig:
    """The configuration where all scores of a vector are in registers at once."""
    block_k = max(16, triton.next_power_of_2(num_codes))
    row = architecture()
    return TopkConfig(
        # A thread holds 32 scores, and beside them their places in the result.
        block_n=min(64, 2 ** (15 if INTERPRETED else 13) // block_k),
        block_k=block_k,
        block_d=min(row.on_chip_block_d, max(16, triton.next_power_of_2(num_features))),
        num_warps=8,
        num_stages=row.on_chip_stages,
    )


def stream_config(num_features: int) -> TopkConfig:
    """The configuration where tiles of codes stream past."""
    return TopkConfig(
        block_n=128,
        block_k=architecture().stream_block_k,
        block_d=min(64, max(16, triton.next_power_of_2(num_features))),
        num_warps=8,
        num_stages=3,
    )

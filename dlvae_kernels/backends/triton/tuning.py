"""Block sizes, by bucketed sizes and architecture: apart from the kernels, and never by the name of a GPU."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

# Triton's interpreter computes with NumPy, which has no bfloat16: kernels then multiply in float32.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Where fewer programs than this would run, work is split among more: two for each multiprocessor of a large GPU.
WANTED_PROGRAMS = 264
_MOST_SPLITS = 64


@dataclass(frozen=True)
class SearchConfig:
    """Of the search: tiles of BLOCK_N rows by BLOCK_K codes, BLOCK_D features at a time."""

    block_n: int
    block_k: int
    block_d: int
    # So many codes share a running maximum, and are told apart at the end, LOOK_D features at a time.
    group: int
    look_d: int
    # All parts of a product, and the bias, lie side by side in one block of features.
    packed: bool
    num_warps: int
    num_stages: int
    max_registers: int

    def padded(self, num_features: int) -> int:
        """D rounded up to whole blocks."""
        return self.block_d if self.packed else -(-num_features // self.block_d) * self.block_d


@dataclass(frozen=True)
class TopkConfig:
    """Of `topk_codes`: tiles of BLOCK_N rows by BLOCK_K codes, BLOCK_D features at a time."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int
    packed: bool = False

    def padded(self, num_features: int) -> int:
        """D rounded up to whole blocks."""
        return -(-num_features // self.block_d) * self.block_d


def architecture() -> int:
    """Compute capability of the current device, as 90; of Triton's interpreter that of Hopper."""
    return 90 if INTERPRETED else _architecture(triton.runtime.driver.active.get_current_device())


@lru_cache
def _architecture(device: int) -> int:
    return int(triton.runtime.driver.active.get_current_target().arch)


def search_config(num_features: int, num_codes: int, dtype: torch.dtype, splits: bool, certifies: bool) -> SearchConfig:
    """For D features, K codes and parts of a dtype.

    Args:
        splits: whether there are two parts.
        certifies: whether the second best score is kept.
    """
    arch = architecture()
    # A certificate has one more register for each group.
    group = max(_group(num_features, num_codes), 4 if certifies else 2)
    # Three parts of the features and three of the bias in 32 columns.
    packed = splits and 3 * num_features + 3 <= 32
    bytes_per_feature = dtype.itemsize * (2 if splits else 1)
    if arch >= 90:
        # Small groups of split rows leave few registers for the second look.
        is_tight = packed or arch >= 100 or (splits and group == 2)
        block_k, num_warps, look = 128, 8, 32 if is_tight else 64
        # Rows stay in shared memory, as far as that and the registers reach; longer ones are read anew for each tile.
        if splits:
            most = 32 if arch >= 100 else 64 if certifies else 128
        else:
            most = 128 if bytes_per_feature == 2 or (arch < 100 and not certifies) else 64
        chunk = 32 if splits else 64
    else:
        # Operands pass through registers, and four warps keep all codes of a row in one.
        block_k, num_warps, look, most, chunk = 32, 4, 16, 16, 16
    block_d = 32 if packed else _block_d(num_features, most, chunk)
    stages = 3 if block_k * block_d * bytes_per_feature <= 2**15 else 2
    # Two programs fit a multiprocessor then: one computes products while the other compares.
    is_small = packed or (bytes_per_feature == 2 and num_features <= 64)
    two_fit = 90 <= arch < 100 and is_small and group > 2 and not certifies
    return SearchConfig(
        block_n=128,
        block_k=block_k,
        block_d=block_d,
        group=group,
        look_d=look // group,
        packed=packed,
        num_warps=num_warps,
        num_stages=stages,
        max_registers=128 if two_fit else 255,
    )


def on_chip_config(num_features: int, num_codes: int) -> TopkConfig:
    """Where all scores of a row are in registers at once."""
    block_k = max(16, triton.next_power_of_2(num_codes))
    is_new = architecture() >= 90
    return TopkConfig(
        # 32 scores a thread: beside them their places are in registers.
        block_n=min(64, 2 ** (15 if INTERPRETED else 13) // block_k),
        block_k=block_k,
        block_d=min(32 if is_new else 16, max(16, triton.next_power_of_2(num_features))),
        num_warps=8,
        num_stages=2 if is_new else 1,
    )


def filter_config(num_features: int) -> TopkConfig:
    """Where tiles of codes stream past."""
    return TopkConfig(
        block_n=128,
        block_k=128 if 90 <= architecture() < 100 else 64,
        block_d=min(64, max(16, triton.next_power_of_2(num_features))),
        num_warps=8,
        num_stages=3,
    )


def _group(num_features: int, num_codes: int) -> int:
    """A larger group spares instructions for each code, and costs a second look at `group` codes of D features."""
    for group, codes_per_feature in ((8, 32), (4, 8)):
        if num_codes >= codes_per_feature * num_features and group * num_features <= 512:
            return group
    return 2


def _block_d(num_features: int, most: int, chunk: int) -> int:
    """A whole row where a power of two is not much longer and rows are aligned, else chunks."""
    whole = max(16, 1 << (num_features - 1).bit_length())
    if whole <= min(most, 64) or (whole <= most and 4 * num_features >= 3 * whole and num_features % 4 == 0):
        return whole
    return chunk


def num_splits(num_rows: int, num_tiles: int, config: SearchConfig | TopkConfig) -> int:
    """Among how many programs the codes of one block of rows are split."""
    blocks = max(1, -(-num_rows // config.block_n))
    return max(1, min(WANTED_PROGRAMS // blocks, num_tiles, _MOST_SPLITS))


@dataclass(frozen=True)
class SoftmaxConfig:
    """Of `kept_softmax`: tiles of BLOCK_A by BLOCK_B, BLOCK_D features at a time; BLOCK_OUT features are summed."""

    block_a: int
    block_b: int
    block_d: int
    block_out: int
    num_warps: int


def log_sum_exp_config(wide: bool) -> SoftmaxConfig:
    """`wide`: products of float32."""
    block_b = 128 if architecture() >= 90 else 64
    return SoftmaxConfig(block_a=128, block_b=block_b, block_d=_softmax_block_d(wide), block_out=0, num_warps=8)


def softmax_sum_config(num_features: int, wide: bool) -> SoftmaxConfig:
    """The widest BLOCK_OUT that the registers hold: the logits are made again for each."""
    most = 256 if architecture() >= (100 if wide else 90) else 128
    block_out = min(most, max(16, 1 << (num_features - 1).bit_length()))
    return SoftmaxConfig(block_a=64, block_b=32, block_d=_softmax_block_d(wide), block_out=block_out, num_warps=8)


def _softmax_block_d(wide: bool) -> int:
    """One for both: the same logits have to be made again, to the bit."""
    if wide:
        return 32 if architecture() >= 100 else 16
    return 64 if architecture() >= 90 else 32


def splits_of(blocks: int, tiles: int, most_tiles: int | None = None) -> tuple[int, int]:
    """How many splits, of how many tiles each, give about the wanted programs; a split has at most `most_tiles`."""
    per_split = max(1, triton.cdiv(tiles, max(1, WANTED_PROGRAMS // max(1, blocks))))
    per_split = per_split if most_tiles is None else min(per_split, most_tiles)
    return triton.cdiv(tiles, per_split), per_split


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of a tensor, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

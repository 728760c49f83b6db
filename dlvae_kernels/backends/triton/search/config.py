"""Block sizes of the search for the nearest code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..architectures import architecture


@dataclass(frozen=True)
class SearchConfig:
    """Tiles of BLOCK_N vectors by BLOCK_K codes, BLOCK_D features at a time."""

    block_n: int
    block_k: int
    block_d: int
    # The codes that share a running maximum. The exact comparison of a group loads COMPARE_D features at a time.
    group: int
    compare_d: int
    # All terms of a product and the bias lie side by side in one block of features.
    packed: bool
    num_warps: int
    num_stages: int
    max_registers: int

    def padded(self, num_features: int) -> int:
        """D rounded up to whole blocks."""
        return self.block_d if self.packed else -(-num_features // self.block_d) * self.block_d


def search_config(
    num_features: int, num_codes: int, dtype: torch.dtype, two_terms: bool, certifies: bool
) -> SearchConfig:
    """The configuration for D features and K codes.

    Args:
        dtype: the dtype of the operands of the matrix units.
        two_terms: whether an operand has a high and a low term.
        certifies: whether the runner-up is kept too.
    """
    blocks = architecture().search
    # The runner-up takes one more register for each group.
    group = max(_group(num_features, num_codes), 4 if certifies else 2)
    # Three terms of the features and three of the bias fit into 32 columns.
    packed = two_terms and 3 * num_features + 3 <= 32
    bytes_per_feature = dtype.itemsize * (2 if two_terms else 1)
    if two_terms:
        resident = blocks.resident_two_terms_certified if certifies else blocks.resident_two_terms
    else:
        resident = blocks.resident_half if dtype.itemsize == 2 else blocks.resident_tf32
    chunk = blocks.chunk_two_terms if two_terms else blocks.chunk_one_term
    block_d = 32 if packed else _block_d(num_features, resident, chunk)
    # Two terms of vectors in small groups leave few registers for the exact comparison.
    is_tight = packed or (two_terms and group == 2)
    is_small = packed or (bytes_per_feature == 2 and num_features <= 64)
    return SearchConfig(
        block_n=128,
        block_k=blocks.block_k,
        block_d=block_d,
        group=group,
        compare_d=(blocks.compared_tight if is_tight else blocks.compared) // group,
        packed=packed,
        num_warps=blocks.num_warps,
        num_stages=3 if blocks.block_k * block_d * bytes_per_feature <= 2**15 else 2,
        # With few registers two programs share a multiprocessor: one multiplies while the other compares.
        max_registers=blocks.registers_small if is_small and group > 2 and not certifies else 255,
    )


def _group(num_features: int, num_codes: int) -> int:
    """The size of a group: a larger one saves instructions for each code, but more codes are compared exactly."""
    for group, codes_per_feature in ((8, 32), (4, 8)):
        if num_codes >= codes_per_feature * num_features and group * num_features <= 512:
            return group
    return 2


def _block_d(num_features: int, resident: int, chunk: int) -> int:
    """All features, if the next power of two is at most `resident`, not much larger than D and loads are aligned."""
    whole = max(16, 1 << (num_features - 1).bit_length())
    is_aligned = 4 * num_features >= 3 * whole and num_features % 4 == 0
    if whole <= min(resident, 64) or (whole <= resident and is_aligned):
        return whole
    return chunk

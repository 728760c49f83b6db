"""Block sizes, by bucketed sizes and architecture: apart from the kernels, and never by the name of a GPU."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

# Triton's interpreter computes with NumPy, which has no bfloat16: kernels then multiply in float32.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Where fewer programs than this search, the codes are split among them: two for each multiprocessor of a large GPU.
_WANTED_PROGRAMS = 264
_MOST_SPLITS = 64


@dataclass(frozen=True)
class SearchConfig:
    """Of the search: tiles of BLOCK_N rows by BLOCK_K codes, BLOCK_D features at a time.

    group: so many codes share a running maximum, and are told apart at the end.
    packed: all parts of a product, and the bias, lie side by side in one block of features.
    """

    block_n: int
    block_k: int
    block_d: int
    group: int
    packed: bool
    num_warps: int
    num_stages: int

    def padded(self, num_features: int) -> int:
        """D rounded up to whole blocks."""
        return self.block_d if self.packed else -(-num_features // self.block_d) * self.block_d


def architecture() -> int:
    """Compute capability of the current device, as 90; of Triton's interpreter that of Hopper."""
    return 90 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)


def search_config(num_features: int, num_codes: int, dtype: torch.dtype, splits: bool, certifies: bool) -> SearchConfig:
    """For D features, K codes, parts of a dtype, two of them or one, and with the second best score kept or not."""
    group = _group(num_features, num_codes)
    # Three parts of the features and three of the bias in 32 columns.
    if splits and 3 * num_features + 3 <= 32:
        return SearchConfig(128, 128, 32, group, True, 8, 3)
    bytes_per_feature = dtype.itemsize * (2 if splits else 1)
    if architecture() >= 90:
        block_d = _block_d(num_features, 128)
        block_k = int(os.environ.get("BK", "128"))
    else:
        # Operands pass through registers.
        block_k = 64
        block_d = _block_d(num_features, 64 if bytes_per_feature <= 2 else 32)
    group = int(os.environ.get("GR", group))
    stages = 3 if block_k * block_d * bytes_per_feature <= 2**15 else 2
    return SearchConfig(128, block_k, block_d, group, False, 8, stages)


def _group(num_features: int, num_codes: int) -> int:
    """A larger group spares instructions for each code, and costs a second look at `group` codes of D features."""
    group = 8
    while group > 2 and (4 * group * num_features > num_codes or group * num_features > 512):
        group //= 2
    return group


def _block_d(num_features: int, most: int) -> int:
    """A whole row where a power of two is not much longer, else chunks."""
    whole = max(16, 1 << (num_features - 1).bit_length())
    if whole <= most and (whole <= 64 or 4 * num_features >= 3 * whole):
        return whole
    return min(most, 64 if num_features > 128 else 32)


def num_splits(num_rows: int, num_tiles: int, config: SearchConfig) -> int:
    """Among how many programs the codes of one block of rows are split."""
    blocks = max(1, -(-num_rows // config.block_n))
    return max(1, min(_WANTED_PROGRAMS // blocks, num_tiles, _MOST_SPLITS))


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of a tensor, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

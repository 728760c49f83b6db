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
    """Of the search: tiles of BLOCK_N rows by BLOCK_K codes, BLOCK_D features at a time."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int

    def padded(self, num_features: int) -> int:
        """D rounded up to whole blocks."""
        return -(-num_features // self.block_d) * self.block_d


def architecture() -> int:
    """Compute capability of the current device, as 90; of Triton's interpreter that of Hopper."""
    return 90 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)


def search_config(num_features: int, dtype: torch.dtype, splits: bool, certifies: bool) -> SearchConfig:
    """For D features, parts of a dtype, two of them or one, and with the second best score kept or not."""
    bytes_per_feature = dtype.itemsize * (2 if splits else 1)
    if architecture() >= 90:
        # Three registers a distance and thread, four to certify; both operands lie in shared memory. Rows that are
        # read anew for each tile want registers too.
        block_d = _block_d(num_features, 128 if bytes_per_feature <= 4 else 64)
        block_k = 64 if certifies or block_d < num_features else 128
    else:
        # Operands pass through registers.
        block_k = 64
        block_d = _block_d(num_features, 64 if bytes_per_feature <= 2 else 32)
    stages = 3 if block_k * block_d * bytes_per_feature <= 2**15 else 2
    return SearchConfig(128, block_k, block_d, 8, stages)


def _block_d(num_features: int, most: int) -> int:
    """A whole row where a power of two is just its length, else chunks."""
    whole = max(16, 1 << (num_features - 1).bit_length())
    if whole <= most and whole - num_features < 16:
        return whole
    return min(most, 64 if num_features > 128 else 32)


def num_splits(num_rows: int, num_tiles: int, config: SearchConfig) -> int:
    """Among how many programs the codes of one block of rows are split."""
    blocks = max(1, -(-num_rows // config.block_n))
    return max(1, min(_WANTED_PROGRAMS // blocks, num_tiles, _MOST_SPLITS))


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of a tensor, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

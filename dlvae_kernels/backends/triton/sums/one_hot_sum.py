"""Sums and counts of vectors by code, for few codes: one_hot^T x on the matrix units, with the one-hot in registers.

The order of additions is fixed. A program adds the sums of its tiles of vectors one after another, at most MAX_TILES of
them, and the sums of all programs are added pairwise (docs/numerics.md, section 9.1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import on_device, partition
from ..language.products import sum_marked
from ..language.rows import Rows, load_rows

_BLOCK_N, _BLOCK_K = 64, 128
MAX_TILES = 64
# float32 holds larger counts inexactly.
_MAX_VECTORS = 2**24
# Above this many operations (an estimate), or with more codes, `segment_sum`, which sorts, is faster.
_MAX_FLOP = 3e10
_MAX_CODES = 1024


@triton.jit
def _one_hot_sum_kernel(
    x,
    code_ptr,
    out_ptr,
    num_codes,
    num_levels,
    tiles_each,
    TERMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the sums, and in the last column the counts, of one partition of a level: [partitions, L, K, D + 1]."""
    num_features = x.num_features
    level, partition_of_level = tl.program_id(2) % num_levels, tl.program_id(2) // num_levels
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_K], tl.float32)
    # 64-bit numbers of vectors and codes would spill registers.
    vectors_each = x.num_vectors // num_levels
    end_of_level = (level + 1) * vectors_each
    begin = end_of_level - vectors_each + partition_of_level * tiles_each * BLOCK_N
    for start in range(begin, tl.minimum(begin + tiles_each * BLOCK_N, end_of_level), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        # The code within its level; K or more for no code.
        code = tl.load(code_ptr + n, mask=n < end_of_level, other=num_levels * num_codes).to(tl.int32)
        code -= level * num_codes
        # A vector without a code may hold NaN or infinity.
        y = tl.where((code < num_codes)[:, None], load_rows(x, n, d), 0.0)
        is_code = k[:, None] == code[None, :]
        count += tl.sum(is_code.to(tl.float32), axis=1)
        # The matrix units round towards zero when they add to an accumulator: each tile starts from 0.
        total += sum_marked(is_code, y, tl.zeros([BLOCK_K, BLOCK_D], tl.float32), TERMS)
    at = out_ptr + (tl.program_id(2).to(tl.int64) * num_codes + k) * (num_features + 1)
    tl.store(at[:, None] + d[None, :], total, mask=(k < num_codes)[:, None] & (d < num_features)[None, :])
    tl.store(at + num_features, count, mask=(k < num_codes) & (tl.program_id(1) == 0))


def suits(x: Rows, num_codes: int, num_levels: int = 1) -> bool:
    """Whether this is likely faster than `segment_sum`, and counts are exact."""
    terms = 3 if x.tensor.dtype == torch.float32 else 1
    num_vectors = x.num_vectors // num_levels
    is_small = num_codes <= _MAX_CODES and num_vectors <= _MAX_VECTORS
    return is_small and 2.0 * num_vectors * num_codes * x.num_features * terms <= _MAX_FLOP


def one_hot_sum(x: Rows, codes: Tensor, num_codes: int, num_levels: int = 1) -> Tensor:
    """The sums and counts [L * K, D + 1] float32 of vectors by assignments [L * N]; L * K (no code) is left out.

    The vectors of level l are N consecutive ones, and their codes lie in [l * K, (l + 1) * K).
    """
    # The numbers of several levels take registers too.
    block_n = _BLOCK_N if num_levels == 1 else _BLOCK_N // 2
    block_d = min(64, max(16, triton.next_power_of_2(x.num_features)))
    blocks = triton.cdiv(num_codes, _BLOCK_K), triton.cdiv(x.num_features, block_d)
    with on_device(x.tensor):
        tiles = triton.cdiv(x.num_vectors // num_levels, block_n)
        partitions, tiles_each = partition(blocks[0] * blocks[1] * num_levels, tiles, max_tiles=MAX_TILES)
        shape = partitions, num_levels * num_codes, x.num_features + 1
        out = torch.empty(shape, dtype=torch.float32, device=x.tensor.device)
        _one_hot_sum_kernel[(*blocks, num_levels * partitions)](
            x,
            codes,
            out,
            num_codes,
            num_levels,
            tiles_each,
            TERMS=3 if x.tensor.dtype == torch.float32 else 1,
            BLOCK_N=block_n,
            BLOCK_K=_BLOCK_K,
            BLOCK_D=block_d,
            num_warps=8,
        )
    return out.sum(0) if partitions > 1 else out[0]

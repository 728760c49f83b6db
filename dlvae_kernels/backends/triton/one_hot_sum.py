"""Sums and counts of rows by code, for few codes: one_hot^T x on the matrix units, the one-hot made in registers.

The order of additions is fixed: a program adds the sums of its tiles of rows one after another, at most _MOST_TILES of
them since the error of such a chain grows with its length, and the sums of all programs are added pairwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .products import sum_marked
from .rows import Rows, load_rows
from .tuning import INTERPRETED, on_device, splits_of

_BLOCK_N, _BLOCK_K = 64, 128
_MOST_TILES = 64
# A count of more rows is not exact in float32.
_MOST_ROWS = 2**24
# Of products; about here a sort takes as long (an estimate). Beyond it, and for many codes, `segment_sum` sorts.
_MOST_FLOP = 3e10
_MOST_CODES = 1024


@triton.jit
def _one_hot_sum_kernel(
    rows,
    code_ptr,
    out_ptr,
    num_codes,
    tiles_per_split,
    TERMS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums, and in the last column numbers, of the rows of one split: [splits, K, D + 1]."""
    num_rows, num_features = rows.num_rows, rows.num_features
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_K], tl.float32)
    begin = tl.program_id(2).to(tl.int64) * tiles_per_split * BLOCK_N
    for start in range(begin, tl.minimum(begin + tiles_per_split * BLOCK_N, num_rows), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        code = tl.load(code_ptr + n, mask=n < num_rows, other=num_codes)
        x = load_rows(rows, n, d)
        # A row without a code may hold what is not finite.
        x = tl.where((code < num_codes)[:, None], x, 0.0)
        is_code = k[:, None] == code[None, :]
        count += tl.sum(is_code.to(tl.float32), axis=1)
        # The matrix units round towards zero what they add to, so that a chain of their additions is biased.
        total += sum_marked(is_code, x, tl.zeros([BLOCK_K, BLOCK_D], tl.float32), TERMS, UPCAST)
    at = out_ptr + (tl.program_id(2).to(tl.int64) * num_codes + k) * (num_features + 1)
    tl.store(at[:, None] + d[None, :], total, mask=(k < num_codes)[:, None] & (d < num_features)[None, :])
    tl.store(at + num_features, count, mask=(k < num_codes) & (tl.program_id(1) == 0))


def suits(rows: Rows, num_codes: int) -> bool:
    """Whether this is likely the faster way."""
    terms = 3 if rows.tensor.dtype == torch.float32 else 1
    is_small = num_codes <= _MOST_CODES and rows.num_rows <= _MOST_ROWS
    return is_small and 2.0 * rows.num_rows * num_codes * rows.num_features * terms <= _MOST_FLOP


def one_hot_sum(rows: Rows, codes: Tensor, num_codes: int) -> Tensor:
    """Sums and numbers [K, D + 1] float32 of rows by their codes [N]; rows of code K are left out."""
    block_d = min(64, max(16, triton.next_power_of_2(rows.num_features)))
    blocks = triton.cdiv(num_codes, _BLOCK_K), triton.cdiv(rows.num_features, block_d)
    tiles = triton.cdiv(rows.num_rows, _BLOCK_N)
    splits, per_split = splits_of(blocks[0] * blocks[1], tiles, _MOST_TILES)
    x = rows.tensor
    out = torch.empty(splits, num_codes, rows.num_features + 1, dtype=torch.float32, device=x.device)
    with on_device(x):
        _one_hot_sum_kernel[(*blocks, splits)](
            rows,
            codes,
            out,
            num_codes,
            per_split,
            TERMS=3 if x.dtype == torch.float32 else 1,
            UPCAST=INTERPRETED,
            BLOCK_N=_BLOCK_N,
            BLOCK_K=_BLOCK_K,
            BLOCK_D=block_d,
            num_warps=8,
        )
    return out.sum(0)

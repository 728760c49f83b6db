"""Sums of exp(logit) of rows over all codes, tile by tile (Milakov and Gimelshein 2018, arXiv:1805.02867).

The logits of the kept codes are taken out of the same tiles: computed otherwise they would round otherwise, and beside
a large logit its softmax shows that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Rows, load_rows
from .tuning import INTERPRETED, log_sum_exp_config, on_device, splits_of

LOWEST = tl.constexpr(-3.4028234e38)


@triton.jit
def inner_products(a, b, i, j, WIDE: tl.constexpr, BLOCK_D: tl.constexpr):  # [BLOCK_A, BLOCK_B] float32
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for begin in range(0, a.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        left = load_rows(a, i, d)
        right = load_rows(b, j, d)
        if WIDE:
            # Three products of parts on the matrix units round as float32 does.
            left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right.T, acc=total, input_precision="tf32x3")
        else:
            total = tl.dot(left, right.T, acc=total)
    return total


@triton.jit
def _log_sum_exp_kernel(
    rows,
    codes,
    shift_ptr,
    index_ptr,
    kept_ptr,
    largest_ptr,
    total_ptr,
    kept,
    tiles_per_split,
    WIDE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
):
    """Largest logit m of rows a over the codes b of one split, and sum of exp(logit - m), [splits, N]; kept logits."""
    a = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    largest = tl.full([BLOCK_A], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32)
    first = tl.program_id(1) * tiles_per_split * BLOCK_B
    for start in range(first, tl.minimum(first + tiles_per_split * BLOCK_B, codes.num_rows), BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        logits = inner_products(rows, codes, a, b, WIDE, BLOCK_D)
        logits += tl.load(shift_ptr + b, mask=b < codes.num_rows, other=float("-inf"))[None, :]
        most = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - most) + tl.sum(tl.exp(logits - most[:, None]), axis=1)
        largest = most
        for begin in range(0, kept, BLOCK_KEPT):
            j = begin + tl.arange(0, BLOCK_KEPT)
            inside = (a < rows.num_rows)[:, None] & (j < kept)[None, :]
            at = a[:, None] * kept + j[None, :]
            column = tl.load(index_ptr + at, mask=inside, other=-1) - start
            is_here = (column >= 0) & (column < BLOCK_B)
            found = tl.gather(logits, tl.where(is_here, column, 0).to(tl.int32), axis=1)
            tl.store(kept_ptr + at, found, mask=is_here)
    out = tl.program_id(1).to(tl.int64) * rows.num_rows + a
    tl.store(largest_ptr + out, largest, mask=a < rows.num_rows)
    tl.store(total_ptr + out, total, mask=a < rows.num_rows)


def is_wide(x: Tensor, weight: Tensor) -> bool:
    """Products of half-precision inputs of one type are exact in float32 as they are."""
    return INTERPRETED or x.dtype != weight.dtype or x.dtype == torch.float32


def log_sum_exp(rows: Rows, codes: Rows, offsets: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the logits at indices [N, k], the largest logit m, and the sum of exp(logit - m); float32.

    The logit at an index that is no code is -inf.
    """
    with on_device(offsets):
        config = log_sum_exp_config(is_wide(rows.tensor, codes.tensor))
    blocks = triton.cdiv(rows.num_rows, config.block_a)
    splits, per_split = splits_of(blocks, triton.cdiv(codes.num_rows, config.block_b))
    largest, totals = torch.empty(2, splits, rows.num_rows, dtype=torch.float32, device=offsets.device)
    kept = torch.full(indices.shape, float("-inf"), dtype=torch.float32, device=offsets.device)
    if blocks > 0:
        with on_device(offsets):
            _log_sum_exp_kernel[(blocks, splits)](
                rows,
                codes,
                offsets,
                indices,
                kept,
                largest,
                totals,
                indices.shape[1],
                per_split,
                WIDE=is_wide(rows.tensor, codes.tensor),
                BLOCK_A=config.block_a,
                BLOCK_B=config.block_b,
                BLOCK_D=config.block_d,
                BLOCK_KEPT=min(32, triton.next_power_of_2(indices.shape[1])),
                num_warps=config.num_warps,
            )
    if splits == 1:
        return kept, largest[0], totals[0]
    most = largest.amax(0)
    return kept, most, (totals * (largest - most).exp_()).sum(0)

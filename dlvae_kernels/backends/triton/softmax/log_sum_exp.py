"""Sums of exp(logit) of vectors over all codes, tile by tile (Milakov and Gimelshein 2018, arXiv:1805.02867).

The logits of the selected codes are taken from the same tiles. Computed by other products they would round differently,
which shows in the softmax of a large logit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import on_device, partition
from ..language.rows import Rows
from .config import log_sum_exp_config
from .logits import LEAST_LOGARITHM, inner_products, is_wide

_LOWEST = tl.constexpr(-3.4028234e38)


@triton.jit
def _store_selected(
    out_ptr,
    index_ptr,
    logits,
    n,
    first,
    num_vectors,
    num_selected,
    BLOCK_K: tl.constexpr,
    BLOCK_SELECTED: tl.constexpr,
):
    """Write those logits [BLOCK_N, BLOCK_K] of vectors n and codes `first` and up that the vectors selected."""
    for begin in range(0, num_selected, BLOCK_SELECTED):
        j = begin + tl.arange(0, BLOCK_SELECTED)
        mask = (n < num_vectors)[:, None] & (j < num_selected)[None, :]
        at = n[:, None] * num_selected + j[None, :]
        column = tl.load(index_ptr + at, mask=mask, other=-1) - first
        is_here = (column >= 0) & (column < BLOCK_K)
        found = tl.gather(logits, tl.where(is_here, column, 0).to(tl.int32), axis=1)
        tl.store(out_ptr + at, found, mask=is_here)


@triton.jit
def _log_sum_exp_kernel(
    x,
    codes,
    bias_ptr,
    index_ptr,
    selected_ptr,
    largest_ptr,
    total_ptr,
    num_selected,
    tiles_each,
    WIDE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SELECTED: tl.constexpr,
):
    """Write the selected logits, and for each partition the largest logit m and the sum of exp(logit - m)."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    largest = tl.full([BLOCK_A], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32)
    begin = tl.program_id(1) * tiles_each * BLOCK_B
    for first in range(begin, tl.minimum(begin + tiles_each * BLOCK_B, codes.num_vectors), BLOCK_B):
        k = first + tl.arange(0, BLOCK_B)
        logits = inner_products(x, codes, n, k, WIDE, BLOCK_D)
        logits += tl.load(bias_ptr + k, mask=k < codes.num_vectors, other=float("-inf"))[None, :]
        most = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - most) + tl.sum(tl.exp(logits - most[:, None]), axis=1)
        largest = most
        _store_selected(selected_ptr, index_ptr, logits, n, first, x.num_vectors, num_selected, BLOCK_B, BLOCK_SELECTED)
    at = tl.program_id(1).to(tl.int64) * x.num_vectors + n
    tl.store(largest_ptr + at, largest, mask=n < x.num_vectors)
    tl.store(total_ptr + at, total, mask=n < x.num_vectors)


def log_sum_exp(x: Rows, codes: Rows, bias: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each vector the logits at indices [N, k], the largest logit m, and the sum of exp(logit - m); float32.

    The logit at an index out of range is -inf.

    Args:
        bias: [K] float32, added to x . c.
    """
    wide, device = is_wide(x, codes), bias.device
    selected = torch.full(indices.shape, float("-inf"), dtype=torch.float32, device=device)
    with on_device(bias):
        config = log_sum_exp_config(wide)
        blocks = triton.cdiv(x.num_vectors, config.block_a)
        partitions, tiles_each = partition(blocks, triton.cdiv(codes.num_vectors, config.block_b))
        largest, totals = torch.empty(2, partitions, x.num_vectors, dtype=torch.float32, device=device)
        if blocks > 0:
            _log_sum_exp_kernel[(blocks, partitions)](
                x,
                codes,
                bias,
                indices,
                selected,
                largest,
                totals,
                indices.shape[1],
                tiles_each,
                WIDE=wide,
                BLOCK_A=config.block_a,
                BLOCK_B=config.block_b,
                BLOCK_D=config.block_d,
                BLOCK_SELECTED=min(32, triton.next_power_of_2(indices.shape[1])),
                num_warps=config.num_warps,
            )
    if partitions == 1:
        return selected, largest[0], totals[0]
    most = largest.amax(0)
    return selected, most, (totals * (largest - most).exp_()).sum(0)


@triton.jit
def _entropy_sums_kernel(
    x,
    codes,
    bias_ptr,
    out_ptr,
    tiles_each,
    WIDE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write for each partition the largest logit m and the sums of w and of w (logit - m), w = exp(logit - m)."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    largest = tl.full([BLOCK_A], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32)
    weighted = tl.zeros([BLOCK_A], tl.float32)
    begin = tl.program_id(1) * tiles_each * BLOCK_B
    for first in range(begin, tl.minimum(begin + tiles_each * BLOCK_B, codes.num_vectors), BLOCK_B):
        k = first + tl.arange(0, BLOCK_B)
        logits = inner_products(x, codes, n, k, WIDE, BLOCK_D)
        logits += tl.load(bias_ptr + k, mask=k < codes.num_vectors, other=float("-inf"))[None, :]
        most = tl.maximum(largest, tl.max(logits, axis=1))
        scale = tl.exp(largest - most)
        weighted = (weighted + total * tl.maximum(largest - most, LEAST_LOGARITHM)) * scale
        shifted = logits - most[:, None]
        weights = tl.exp(shifted)
        total = total * scale + tl.sum(weights, axis=1)
        weighted += tl.sum(weights * tl.maximum(shifted, LEAST_LOGARITHM), axis=1)
        largest = most
    at = out_ptr + tl.program_id(1).to(tl.int64) * 3 * x.num_vectors + n
    tl.store(at, largest, mask=n < x.num_vectors)
    tl.store(at + x.num_vectors, total, mask=n < x.num_vectors)
    tl.store(at + 2 * x.num_vectors, weighted, mask=n < x.num_vectors)


def entropy_sums(x: Rows, codes: Rows, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each vector the largest logit m, the sum of exp(logit - m), and the entropy of the softmax; float32.

    Args:
        bias: [K] float32, added to x . c.
    """
    wide = is_wide(x, codes)
    with on_device(bias):
        config = log_sum_exp_config(wide)
        blocks = triton.cdiv(x.num_vectors, config.block_a)
        partitions, tiles_each = partition(blocks, triton.cdiv(codes.num_vectors, config.block_b))
        out = torch.empty(partitions, 3, x.num_vectors, dtype=torch.float32, device=bias.device)
        if blocks > 0:
            _entropy_sums_kernel[(blocks, partitions)](
                x,
                codes,
                bias,
                out,
                tiles_each,
                WIDE=wide,
                BLOCK_A=config.block_a,
                BLOCK_B=config.block_b,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
            )
    largest, totals, weighted = out.unbind(1)  # [partitions, N]
    most = largest.amax(0)
    scales, shifts = (largest - most).exp(), (largest - most).clamp(min=LEAST_LOGARITHM.value)
    total = (totals * scales).sum(0)
    return most, total, total.log() - ((weighted + totals * shifts) * scales).sum(0) / total

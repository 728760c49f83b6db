"""Sums of vectors weighted by exponentials of their logits, for the backward pass of `kept_softmax`.

The logits of a tile are computed again and never stored (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import on_device, partition
from ..language.rows import Rows, load_rows
from .config import softmax_sum_config
from .logits import inner_products, is_wide


@triton.jit
def _softmax_sum_kernel(
    a,
    b,
    a_shift_ptr,
    b_shift_ptr,
    scale_ptr,
    out_ptr,
    scale_sum_ptr,
    tiles_each,
    BIAS_IN_A: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Write the sums of w b over one partition of b, [partitions, A, D], and with a scale the sums of w.

    w = scale_b exp(a . b + a_shift + b_shift). scale_ptr is None for 1, and out_ptr if only the sums of w are wanted.
    BIAS_IN_A: a are the codes.
    """
    SCALED: tl.constexpr = scale_ptr is not None
    i = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_a = i < a.num_vectors
    a_shift = tl.load(a_shift_ptr + i, mask=is_a, other=float("-inf"))
    total = tl.zeros([BLOCK_A, BLOCK_OUT], tl.float32)
    scale_sum = tl.zeros([BLOCK_A], tl.float32)
    begin = tl.program_id(2).to(tl.int64) * tiles_each * BLOCK_B
    for first in range(begin, tl.minimum(begin + tiles_each * BLOCK_B, b.num_vectors), BLOCK_B):
        j = first + tl.arange(0, BLOCK_B)
        weights = inner_products(a, b, i, j, WIDE, BLOCK_D)
        b_shift = tl.load(b_shift_ptr + j, mask=j < b.num_vectors, other=float("-inf"))
        # The bias of a code is added first, as when the largest logit was found.
        if BIAS_IN_A:
            weights = (weights + a_shift[:, None]) + b_shift[None, :]
        else:
            weights = (weights + b_shift[None, :]) + a_shift[:, None]
        weights = tl.exp(weights)
        if SCALED:
            weights *= tl.load(scale_ptr + j, mask=j < b.num_vectors, other=0.0)[None, :]
            scale_sum += tl.sum(weights, axis=1)
        if out_ptr is not None:
            # Weights of half precision would round the sum.
            total = tl.dot(weights, load_rows(b, j, d).to(tl.float32), acc=total, input_precision="tf32x3")
    at = tl.program_id(2).to(tl.int64) * a.num_vectors + i
    if out_ptr is not None:
        out_mask = is_a[:, None] & (d < a.num_features)[None, :]
        tl.store(out_ptr + at[:, None] * a.num_features + d[None, :], total, mask=out_mask)
    if SCALED:
        tl.store(scale_sum_ptr + at, scale_sum, mask=is_a & (tl.program_id(1) == 0))


def softmax_sum(a: Rows, b: Rows, a_shift: Tensor, b_shift: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each a the sum over all b of w b, [A, D], and of w, [A], with w = scale_b exp(a . b + shifts); float32.

    Without a scale, w has none and its sums are not written.
    """
    wide, device = is_wide(a, b), a_shift.device
    with on_device(a_shift):
        config = softmax_sum_config(a.num_features, wide)
        blocks = triton.cdiv(a.num_vectors, config.block_a), triton.cdiv(a.num_features, config.block_out)
        partitions, tiles_each = partition(blocks[0] * blocks[1], triton.cdiv(b.num_vectors, config.block_b))
        out = torch.empty(partitions, a.num_vectors, a.num_features, dtype=torch.float32, device=device)
        scales = torch.empty(partitions, a.num_vectors, dtype=torch.float32, device=device)
        if out.numel() > 0:
            _softmax_sum_kernel[(*blocks, partitions)](
                a,
                b,
                a_shift,
                b_shift,
                scale,
                out,
                scales,
                tiles_each,
                BIAS_IN_A=scale is not None,
                WIDE=wide,
                BLOCK_A=config.block_a,
                BLOCK_B=config.block_b,
                BLOCK_D=config.block_d,
                BLOCK_OUT=config.block_out,
                num_warps=config.num_warps,
            )
    return (out[0], scales[0]) if partitions == 1 else (out.sum(0), scales.sum(0))


def weight_sum(a: Rows, b: Rows, a_shift: Tensor, b_shift: Tensor, scale: Tensor, *, bias_in_a: bool) -> Tensor:
    """For each a the sum over all b of scale_b exp(a . b + shifts), [A] float32. bias_in_a: a are the codes."""
    wide = is_wide(a, b)
    with on_device(a_shift):
        config = softmax_sum_config(a.num_features, wide)
        blocks = triton.cdiv(a.num_vectors, config.block_a)
        partitions, tiles_each = partition(blocks, triton.cdiv(b.num_vectors, config.block_b))
        sums = torch.zeros(max(1, partitions), a.num_vectors, dtype=torch.float32, device=a_shift.device)
        if blocks > 0 and b.num_vectors > 0:
            _softmax_sum_kernel[(blocks, 1, partitions)](
                a,
                b,
                a_shift,
                b_shift,
                scale,
                None,
                sums,
                tiles_each,
                BIAS_IN_A=bias_in_a,
                WIDE=wide,
                BLOCK_A=config.block_a,
                BLOCK_B=config.block_b,
                BLOCK_D=config.block_d,
                BLOCK_OUT=16,
                num_warps=config.num_warps,
            )
    return sums[0] if len(sums) == 1 else sums.sum(0)

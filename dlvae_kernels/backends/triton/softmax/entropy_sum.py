"""Sums of vectors weighted by the gradients of their logits, for the backward pass of `code_entropy`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import on_device, partition
from ..language.rows import Rows, load_rows
from .config import softmax_sum_config
from .logits import LEAST_LOGARITHM, inner_products, is_wide


@triton.jit
def _entropy_sum_kernel(
    a,
    b,
    a_shift_ptr,
    b_shift_ptr,
    a_term_ptr,
    b_term_ptr,
    grad_ptr,
    scale_ptr,
    out_ptr,
    sum_ptr,
    tiles_each,
    BIAS_IN_A: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Write the sums of w b over one partition of b, [partitions, A, D], and the sums of w.

    w = scale exp(v) (a_term + b_term - grad v), v = a . b + a_shift + b_shift. Scale and grad belong to the vectors,
    which are b if BIAS_IN_A, else a.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_a = i < a.num_vectors
    a_shift = tl.load(a_shift_ptr + i, mask=is_a, other=float("-inf"))
    a_term = tl.load(a_term_ptr + i, mask=is_a, other=0.0)
    total = tl.zeros([BLOCK_A, BLOCK_OUT], tl.float32)
    weight_sum = tl.zeros([BLOCK_A], tl.float32)
    begin = tl.program_id(2).to(tl.int64) * tiles_each * BLOCK_B
    for first in range(begin, tl.minimum(begin + tiles_each * BLOCK_B, b.num_vectors), BLOCK_B):
        j = first + tl.arange(0, BLOCK_B)
        is_b = j < b.num_vectors
        logarithms = inner_products(a, b, i, j, WIDE, BLOCK_D)
        b_shift = tl.load(b_shift_ptr + j, mask=is_b, other=float("-inf"))
        # The bias of a code is added first, as when the largest logit was found.
        if BIAS_IN_A:
            logarithms = (logarithms + a_shift[:, None]) + b_shift[None, :]
            grad = tl.load(grad_ptr + j, mask=is_b, other=0.0)[None, :]
            scale = tl.load(scale_ptr + j, mask=is_b, other=0.0)[None, :]
        else:
            logarithms = (logarithms + b_shift[None, :]) + a_shift[:, None]
            grad = tl.load(grad_ptr + i, mask=is_a, other=0.0)[:, None]
            scale = tl.load(scale_ptr + i, mask=is_a, other=0.0)[:, None]
        terms = a_term[:, None] + tl.load(b_term_ptr + j, mask=is_b, other=0.0)[None, :]
        weights = tl.exp(logarithms) * scale * (terms - grad * tl.maximum(logarithms, LEAST_LOGARITHM))
        weight_sum += tl.sum(weights, axis=1)
        # Weights of half precision would round the sum.
        total = tl.dot(weights, load_rows(b, j, d).to(tl.float32), acc=total, input_precision="tf32x3")
    at = tl.program_id(2).to(tl.int64) * a.num_vectors + i
    tl.store(
        out_ptr + at[:, None] * a.num_features + d[None, :], total, mask=is_a[:, None] & (d < a.num_features)[None, :]
    )
    tl.store(sum_ptr + at, weight_sum, mask=is_a & (tl.program_id(1) == 0))


def entropy_sum(
    a: Rows,
    b: Rows,
    a_shift: Tensor,
    b_shift: Tensor,
    a_term: Tensor,
    b_term: Tensor,
    grad: Tensor,
    scale: Tensor,
    *,
    bias_in_a: bool,
) -> tuple[Tensor, Tensor]:
    """For each a the sum over all b of w b, [A, D], and of w, [A], with the w of the kernel; float32.

    Args:
        bias_in_a: a are the codes.
        grad, scale: [N], of the vectors.
    """
    wide, device = is_wide(a, b), a_shift.device
    with on_device(a_shift):
        config = softmax_sum_config(a.num_features, wide)
        blocks = triton.cdiv(a.num_vectors, config.block_a), triton.cdiv(a.num_features, config.block_out)
        partitions, tiles_each = partition(blocks[0] * blocks[1], triton.cdiv(b.num_vectors, config.block_b))
        out = torch.zeros(max(1, partitions), a.num_vectors, a.num_features, dtype=torch.float32, device=device)
        sums = torch.zeros(len(out), a.num_vectors, dtype=torch.float32, device=device)
        if out.numel() > 0 and b.num_vectors > 0:
            _entropy_sum_kernel[(*blocks, partitions)](
                a,
                b,
                a_shift,
                b_shift,
                a_term,
                b_term,
                grad,
                scale,
                out,
                sums,
                tiles_each,
                BIAS_IN_A=bias_in_a,
                WIDE=wide,
                BLOCK_A=config.block_a,
                BLOCK_B=config.block_b,
                BLOCK_D=config.block_d,
                BLOCK_OUT=config.block_out,
                num_warps=config.num_warps,
            )
    return (out[0], sums[0]) if len(out) == 1 else (out.sum(0), sums.sum(0))

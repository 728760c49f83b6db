"""Triton `vector_quantize`: after the search one pass over the rows gives everything that comes out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nearest_code import search
from .rows import as_rows, load_rows, store_rows
from .segment_sum import segment_sum
from .tuning import on_device

_BLOCK_N = 64


@triton.jit
def _vector_quantize_fwd_kernel(
    x_ptr,
    codes_ptr,
    index_ptr,
    quantized_ptr,
    error_ptr,
    partial_ptr,
    count_ptr,
    num_rows,
    num_features,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    out_inner,
    out_outer,
    out_step,
    out_d,
    stride_ck,
    stride_cd,
    SAVE_ERROR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Codes of rows, their errors, the sum of squared errors of this block, and the counts."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < num_rows
    index = tl.load(index_ptr + rows, mask=mask, other=0)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x = load_rows(x_ptr, rows, d, num_rows, num_features, inner, stride_outer, stride_inner, stride_d)
        offsets = index[:, None] * stride_ck + d.to(tl.int64)[None, :] * stride_cd
        code = tl.load(codes_ptr + offsets, mask=mask[:, None] & (d < num_features)[None, :], other=0.0)
        error = code.to(tl.float32) - x.to(tl.float32)
        squares += tl.sum(error * error, axis=1)
        store_rows(quantized_ptr, code, rows, d, num_rows, num_features, out_inner, out_outer, out_step, out_d)
        if SAVE_ERROR:
            store_rows(error_ptr, error, rows, d, num_rows, num_features, out_inner, out_outer, out_step, out_d)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares, axis=0))
    # Integers add up the same in any order.
    tl.atomic_add(count_ptr + index, tl.full([BLOCK_N], 1, tl.int64), mask=mask, sem="relaxed")


@triton.jit
def _vector_quantize_bwd_kernel(
    grad_ptr,
    error_ptr,
    factor_ptr,
    out_ptr,
    num_rows,
    num_features,
    grad_inner,
    grad_outer,
    grad_step,
    grad_d,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    slope,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad - error * slope * factor, where factor is the gradient of the commitment loss."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad = load_rows(grad_ptr, rows, d, num_rows, num_features, grad_inner, grad_outer, grad_step, grad_d)
    error = load_rows(error_ptr, rows, d, num_rows, num_features, inner, stride_outer, stride_inner, stride_d)
    out = grad.to(tl.float32) - error.to(tl.float32) * slope * tl.load(factor_ptr).to(tl.float32)
    store_rows(out_ptr, out, rows, d, num_rows, num_features, inner, stride_outer, stride_inner, stride_d)


def vector_quantize_fwd(
    x: Tensor, codebook: Tensor, need_error: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    counts = torch.zeros(len(codebook), dtype=torch.int64, device=x.device)
    # empty_like keeps the strides of x: a channel-first map comes back channel-first.
    quantized = torch.empty_like(x)
    error = torch.empty_like(x) if need_error else x.new_empty(0)
    if x.numel() == 0:
        zero = torch.zeros((), dtype=torch.float32, device=x.device)
        return quantized, indices, zero, zero.clone(), counts, error
    rows, out = as_rows(x), as_rows(quantized)
    search(rows, codebook, indices, precision)
    programs = triton.cdiv(rows.num_rows, _BLOCK_N)
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    with on_device(x):
        _vector_quantize_fwd_kernel[(programs,)](
            rows.tensor,
            codebook,
            indices,
            quantized,
            error,
            partial,
            counts,
            rows.num_rows,
            rows.num_features,
            *rows.strides,
            *out.strides,
            *codebook.stride(),
            SAVE_ERROR=need_error,
            BLOCK_N=_BLOCK_N,
            BLOCK_D=64,
        )
    loss = partial.sum() / x.numel()
    return quantized, indices, loss, loss.clone(), counts, error


def vector_quantize_bwd(
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    error: Tensor,
    indices: Tensor,
    num_codes: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    slope = 2 / max(1, error.numel())
    empty = torch.empty(0, dtype=torch.float32, device=error.device)
    grad_x = grad_codebook = empty
    if need_codebook:
        total = segment_sum(error, indices, num_codes, skip_infinite=False)[:, :-1]
        grad_codebook = total * (slope * grad_codebook_loss)
    if need_x:
        grad_x = torch.empty_like(error)
        if error.numel() > 0:
            grad, rows = as_rows(grad_quantized), as_rows(error)
            grid = (triton.cdiv(rows.num_rows, _BLOCK_N), triton.cdiv(rows.num_features, 64))
            with on_device(error):
                _vector_quantize_bwd_kernel[grid](
                    grad.tensor,
                    rows.tensor,
                    grad_commitment_loss,
                    grad_x,
                    rows.num_rows,
                    rows.num_features,
                    *grad.strides,
                    *rows.strides,
                    slope,
                    BLOCK_N=_BLOCK_N,
                    BLOCK_D=64,
                )
    return grad_x, grad_codebook

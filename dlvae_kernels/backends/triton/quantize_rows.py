"""The codes of rows whose indices are known, half their errors, and how often each code was taken."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .rows import Rows, as_rows, load_rows, store_rows, unit

_BLOCK_N = 64


@dataclass(frozen=True)
class Quantized:
    """quantized, half_error: [N, D], the second empty if not wanted; counts: [K] int64, which each row adds to."""

    quantized: Tensor
    half_error: Tensor
    counts: Tensor


@triton.jit
def quantize_rows(
    x_ptr,
    codes_ptr,
    quantized_ptr,
    half_error_ptr,
    count_ptr,
    rows,
    index,
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
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    CODE_UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write codes `index` of `rows`, and with SAVE_ERROR (code - x) / 2; count the codes."""
    mask = rows < num_rows
    starts = index.to(tl.int64) * (stride_ck // CODE_UNIT) * CODE_UNIT
    for begin in range(0, num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        offsets = starts[:, None] + d.to(tl.int64)[None, :] * stride_cd
        code = tl.load(codes_ptr + offsets, mask=mask[:, None] & (d < num_features)[None, :], other=0.0)
        store_rows(
            quantized_ptr, code, rows, d, num_rows, num_features, out_inner, out_outer, out_step, out_d, OUT_UNIT
        )
        if SAVE_ERROR:
            x = load_rows(x_ptr, rows, d, num_rows, num_features, inner, stride_outer, stride_inner, stride_d, UNIT)
            # Half of a difference of two float16 numbers is a float16 number.
            half = (code.to(tl.float32) - x.to(tl.float32)) * 0.5
            store_rows(
                half_error_ptr, half, rows, d, num_rows, num_features, out_inner, out_outer, out_step, out_d, OUT_UNIT
            )
    # Integers add up the same in any order.
    tl.atomic_add(count_ptr + index, tl.full(index.shape, 1, tl.int64), mask=mask, sem="relaxed")


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    codes_ptr,
    index_ptr,
    quantized_ptr,
    half_error_ptr,
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
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    CODE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    quantize_rows(
        x_ptr,
        codes_ptr,
        quantized_ptr,
        half_error_ptr,
        count_ptr,
        rows,
        tl.load(index_ptr + rows, mask=rows < num_rows, other=0),
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
        SAVE_ERROR,
        UNIT,
        OUT_UNIT,
        CODE_UNIT,
        BLOCK_D,
    )


def launch_quantize_rows(rows: Rows, codebook: Tensor, indices: Tensor, out: Quantized) -> None:
    """What the search does by itself where one program sees all codes."""
    out_strides = as_rows(out.quantized).strides
    _quantize_rows_kernel[(triton.cdiv(rows.num_rows, _BLOCK_N),)](
        rows.tensor,
        codebook,
        indices,
        out.quantized,
        out.half_error,
        out.counts,
        rows.num_rows,
        rows.num_features,
        *rows.strides,
        *out_strides,
        *codebook.stride(),
        SAVE_ERROR=out.half_error.numel() > 0,
        UNIT=unit(*rows.strides[1:3]),
        OUT_UNIT=unit(*out_strides[1:3]),
        CODE_UNIT=unit(codebook.stride(0)),
        BLOCK_N=_BLOCK_N,
        BLOCK_D=64,
    )

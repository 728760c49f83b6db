"""Rows of a tensor of any strides, as kernels read them: an argument with the pointer, the sizes and the strides."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """Rows [N, D]: row n begins at n // inner * stride_outer + n % inner * stride_inner; None of both where it is
    n * stride_inner, which spares the division.
    """

    tensor: Tensor
    num_rows: int
    num_features: int
    inner: int | None
    stride_outer: int | None
    stride_inner: int
    stride_d: int
    # The largest power of two up to 16 that divides both strides: kernels that know it load 16 bytes at once.
    unit: tl.constexpr


def as_rows(x: Tensor) -> Rows:
    """The rows of x [..., D], without a copy where two dimensions can hold them, as those of a map do."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return as_rows(x.contiguous())
    (_, outer), (inner, step) = [(1, 0), (1, 0), *merged][-2:]
    unit = tl.constexpr(math.gcd(outer, step, 16))
    sizes = x.numel() // x.shape[-1], x.shape[-1]
    if len(merged) < 2:
        return Rows(x, *sizes, None, None, step, x.stride(-1), unit)
    return Rows(x, *sizes, inner, outer, step, x.stride(-1), unit)


def empty_like_rows(x: Tensor) -> Tensor:
    """A new tensor like x whose rows need no copy."""
    out = torch.empty_like(x)
    return out if as_rows(out).tensor is out else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def laid_out_like(x: Tensor, result: Tensor) -> Tensor:
    """`result` with the strides that `torch.empty_like(x)` has."""
    wanted = torch.empty_like(x)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


@triton.jit
def row_offsets(x, n):
    """Offsets of rows n of x."""
    n = n.to(tl.int64)
    if x.inner is None:
        offsets = n * (x.stride_inner // x.unit)
    else:
        offsets = (n // x.inner) * (x.stride_outer // x.unit) + (n % x.inner) * (x.stride_inner // x.unit)
    return offsets * x.unit


@triton.jit
def code_offsets(codes, index):
    """Offsets of the rows of a codebook [K, D] at these indices."""
    return index.to(tl.int64) * (codes.stride_inner // codes.unit) * codes.unit


@triton.jit
def load_rows(x, n, d):
    """Rows n and features d of x, [BLOCK_N, BLOCK_D]; 0 outside."""
    offsets = row_offsets(x, n)[:, None] + d.to(tl.int64)[None, :] * x.stride_d
    return tl.load(x.tensor + offsets, mask=(n < x.num_rows)[:, None] & (d < x.num_features)[None, :], other=0.0)


@triton.jit
def load_codes(codes, index, d):
    """Codes of these indices and features d of a codebook, [BLOCK_K, BLOCK_D]; 0 for a code that is not there."""
    offsets = code_offsets(codes, index)[:, None] + d.to(tl.int64)[None, :] * codes.stride_d
    inside = ((index >= 0) & (index < codes.num_rows))[:, None] & (d < codes.num_features)[None, :]
    return tl.load(codes.tensor + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(out, value, n, d):
    """Write rows n and features d of out, in its dtype."""
    offsets = row_offsets(out, n)[:, None] + d.to(tl.int64)[None, :] * out.stride_d
    mask = (n < out.num_rows)[:, None] & (d < out.num_features)[None, :]
    tl.store(out.tensor + offsets, value.to(out.tensor.dtype.element_ty), mask=mask)

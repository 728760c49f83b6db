"""Rows of a tensor of any strides, as kernels read them: x[n // inner, n % inner]."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """Rows [N, D]; `strides` are (inner, stride_outer, stride_inner, stride_d) of a kernel."""

    tensor: Tensor
    num_rows: int
    num_features: int
    strides: tuple[int, int, int, int]


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
    return Rows(x, x.numel() // x.shape[-1], x.shape[-1], (inner, outer, step, x.stride(-1)))


def empty_like_rows(x: Tensor) -> Tensor:
    """A new tensor like x whose rows need no copy."""
    out = torch.empty_like(x)
    return out if as_rows(out).tensor is out else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def laid_out_like(x: Tensor, result: Tensor) -> Tensor:
    """`result` with the strides that `torch.empty_like(x)` has."""
    wanted = torch.empty_like(x)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


def unit(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides: kernels that know it load 16 bytes at once."""
    return math.gcd(*strides, 16)


@triton.jit
def row_offsets(n, inner, stride_outer, stride_inner, UNIT: tl.constexpr = 1):
    """Offsets of rows n; UNIT divides both strides, from which the compiler learns how wide it may load."""
    n = n.to(tl.int64)
    return ((n // inner) * (stride_outer // UNIT) + (n % inner) * (stride_inner // UNIT)) * UNIT


@triton.jit
def load_rows(x_ptr, n, d, num_rows, num_features, inner, stride_outer, stride_inner, stride_d, UNIT: tl.constexpr = 1):
    """Rows n and features d of x, [BLOCK_N, BLOCK_D]; 0 outside."""
    offsets = row_offsets(n, inner, stride_outer, stride_inner, UNIT)[:, None] + d.to(tl.int64)[None, :] * stride_d
    return tl.load(x_ptr + offsets, mask=(n < num_rows)[:, None] & (d < num_features)[None, :], other=0.0)


@triton.jit
def load_codes(codes_ptr, index, d, num_codes, num_features, stride_k, stride_d, UNIT: tl.constexpr):
    """Codes of these indices and features d of a codebook, [BLOCK_K, BLOCK_D]; 0 for a code that is not there."""
    offsets = (index.to(tl.int64) * (stride_k // UNIT) * UNIT)[:, None] + d.to(tl.int64)[None, :] * stride_d
    inside = ((index >= 0) & (index < num_codes))[:, None] & (d < num_features)[None, :]
    return tl.load(codes_ptr + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(
    out_ptr, value, n, d, num_rows, num_features, inner, stride_outer, stride_inner, stride_d, UNIT: tl.constexpr = 1
):
    """Write rows n and features d, in the dtype of the tensor."""
    offsets = row_offsets(n, inner, stride_outer, stride_inner, UNIT)[:, None] + d.to(tl.int64)[None, :] * stride_d
    mask = (n < num_rows)[:, None] & (d < num_features)[None, :]
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)

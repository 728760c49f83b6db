"""Named tuples of a tensor, its sizes and strides, which kernels take as one argument, and their loads and stores.

Triton flattens a named tuple; a field that is None or a `tl.constexpr` is a constant of the compiled kernel. A field
must not be called `values` or `type`, which are attributes of Triton's own tuples. Kernels test whether a tensor is
None, not a tuple, tuples are not nested, and no function returns one that may hold None: Triton 3.6 does not compile
these.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """N vectors of D features in a tensor of any strides.

    Vector n begins at n // inner * stride_outer + n % inner * stride_inner, as in a map [B, D, H, W]. Where one stride
    reaches all vectors, inner and stride_outer are None, which saves the division.

    With heads, vector n is vector n // num_heads of head n % num_heads, and begins stride_head after the same vector of
    the head before. The rows of one head have the same fields from num_features to unit, which are rows[2:8].
    """

    tensor: Tensor
    num_vectors: int
    num_features: int
    inner: int | None
    stride_outer: int | None
    stride_inner: int
    stride_d: int
    # The largest power of two, up to 16, that divides all strides: a kernel that knows it can load 16 bytes at once.
    unit: tl.constexpr
    num_heads: tl.constexpr | None = None
    stride_head: int | None = None


class Codes(NamedTuple):
    """A codebook or dictionary of K codes of D features, or one for each of several heads.

    With heads, a program works for one head, the third number of its grid.
    """

    tensor: Tensor
    num_codes: int
    num_features: int
    stride_k: int
    stride_d: int
    # The largest power of two, up to 16, that divides stride_k and stride_head.
    unit: tl.constexpr
    num_heads: tl.constexpr | None = None
    stride_head: int | None = None

    @property
    def heads(self) -> int:
        """The number of heads, on the host."""
        return 1 if self.num_heads is None else int(self.num_heads.value)


def heads_of(codebook: Tensor) -> int:
    """The number of heads: H of a codebook [H, K, D], and 1 of [K, D]."""
    return codebook.shape[0] if codebook.ndim == 3 else 1


def as_rows(x: Tensor, heads: int = 1) -> Rows:
    """The vectors of x [..., D], or with heads those of x [..., H, D].

    x is copied only if more than two strides, beside that of heads, are needed to reach them.
    """
    last = x.ndim - (1 if heads == 1 else 2)
    merged: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:last], x.stride()[:last], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return as_rows(x.contiguous(), heads)
    stride_head = x.stride(-2) if heads > 1 else 0
    unit = tl.constexpr(math.gcd(*(stride for _, stride in merged), stride_head, 16))
    (_, outer), (inner, step) = merged if len(merged) == 2 else ((None, None), (None, merged[0][1] if merged else 0))
    rows = Rows(x, x.numel() // x.shape[-1], x.shape[-1], inner, outer, step, x.stride(-1), unit)
    return rows if heads == 1 else rows._replace(num_heads=tl.constexpr(heads), stride_head=stride_head)


def as_codes(codebook: Tensor) -> Codes:
    """The codes of a codebook [K, D] or [H, K, D]."""
    num_codes, num_features = codebook.shape[-2:]
    stride_k, stride_d = codebook.stride()[-2:]
    unit = tl.constexpr(math.gcd(codebook.stride(0), stride_k, 16))
    codes = Codes(codebook, num_codes, num_features, stride_k, stride_d, unit)
    heads = heads_of(codebook)
    return codes if heads == 1 else codes._replace(num_heads=tl.constexpr(heads), stride_head=codebook.stride(0))


def empty_like_rows(x: Tensor, heads: int = 1) -> Tensor:
    """A new tensor like x that `as_rows` does not copy."""
    out = torch.empty_like(x)
    return out if as_rows(out, heads).tensor is out else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def laid_out_like(x: Tensor, result: Tensor) -> Tensor:
    """`result` with the strides that `torch.empty_like(x)` has."""
    wanted = torch.empty_like(x)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


@triton.jit
def row_offsets(x, n):
    """The offsets at which vectors n of x, numbered over all heads, begin."""
    of_head = 0
    if x.num_heads is not None:
        of_head = (n % x.num_heads).to(tl.int64) * (x.stride_head // x.unit)
        n = n // x.num_heads
    n = n.to(tl.int64)
    if x.inner is None:
        offsets = n * (x.stride_inner // x.unit)
    else:
        offsets = (n // x.inner) * (x.stride_outer // x.unit) + (n % x.inner) * (x.stride_inner // x.unit)
    return (offsets + of_head) * x.unit


@triton.jit
def head_of_program(rows):
    """The head that this program works for; 0 without heads."""
    head = 0
    if rows.num_heads is not None:
        head = tl.program_id(2)
    return head


@triton.jit
def vectors_of_head(rows, head, n):
    """The numbers, over all heads, of vectors n of one head."""
    if rows.num_heads is not None:
        n = n * rows.num_heads + head
    return n


@triton.jit
def offset_of_head(rows, head):
    """The offset at which the first vector, or the first code, of one head begins."""
    offset = 0
    if rows.num_heads is not None:
        offset = tl.cast(head, tl.int64) * (rows.stride_head // rows.unit) * rows.unit
    return offset


@triton.jit
def codes_of_head(codes, head):
    """The codes of one head, as a codebook without heads."""
    start = codes.tensor + offset_of_head(codes, head)
    return Codes(start, codes.num_codes, codes.num_features, codes.stride_k, codes.stride_d, codes.unit, 1, 0)


@triton.jit
def code_offsets(codes, k):
    """The offsets at which codes k begin."""
    return k.to(tl.int64) * (codes.stride_k // codes.unit) * codes.unit


@triton.jit
def load_rows(x, n, d):
    """Features d of vectors n, [BLOCK_N, BLOCK_D]; 0 outside of x."""
    offsets = row_offsets(x, n)[:, None] + d.to(tl.int64)[None, :] * x.stride_d
    return tl.load(x.tensor + offsets, mask=(n < x.num_vectors)[:, None] & (d < x.num_features)[None, :], other=0.0)


@triton.jit
def load_codes_where(codes, k, is_wanted, d):
    """Features d of codes k, [BLOCK_K, BLOCK_D]; 0 where `is_wanted` is false, as it must be for k out of range."""
    offsets = code_offsets(codes, k)[:, None] + d.to(tl.int64)[None, :] * codes.stride_d
    mask = is_wanted[:, None] & (d < codes.num_features)[None, :]
    return tl.load(codes.tensor + offsets, mask=mask, other=0.0)


@triton.jit
def load_codes(codes, k, d):
    """Features d of codes k, [BLOCK_K, BLOCK_D]; 0 where k or d is out of range."""
    return load_codes_where(codes, k, (k >= 0) & (k < codes.num_codes), d)


@triton.jit
def load_code_groups(codes, k, is_code, d):
    """Features d of codes k [BLOCK_N, GROUP], [BLOCK_N, GROUP, BLOCK_D]; 0 where `is_code` is false."""
    offsets = code_offsets(codes, k)[:, :, None] + d.to(tl.int64)[None, None, :] * codes.stride_d
    mask = is_code[:, :, None] & (d < codes.num_features)[None, None, :]
    return tl.load(codes.tensor + offsets, mask=mask, other=0.0)


@triton.jit
def store_like_rows(out_ptr, rows, value, n, d):
    """Write features d of vectors n to a tensor with the sizes and strides of rows."""
    offsets = row_offsets(rows, n)[:, None] + d.to(tl.int64)[None, :] * rows.stride_d
    mask = (n < rows.num_vectors)[:, None] & (d < rows.num_features)[None, :]
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(out, value, n, d):
    """Write features d of vectors n, in the dtype of out."""
    store_like_rows(out.tensor, out, value, n, d)


@triton.jit
def store_codes(codes, value, k, d):
    """Write features d of codes k, which are not negative, in the dtype of the codes."""
    offsets = code_offsets(codes, k)[:, None] + d.to(tl.int64)[None, :] * codes.stride_d
    mask = (k < codes.num_codes)[:, None] & (d < codes.num_features)[None, :]
    tl.store(codes.tensor + offsets, value.to(codes.tensor.dtype.element_ty), mask=mask)


@triton.jit
def largest_and_squares(x, n, end, BLOCK_D: tl.constexpr):
    """The largest magnitude of a feature and the sum of squares of vectors n, [BLOCK_N] float32.

    `end` is at least D; a constant lets the compiler know the number of steps.
    """
    largest = tl.zeros([n.shape[0]], tl.float32)
    squares = tl.zeros([n.shape[0]], tl.float32)
    for begin in range(0, end, BLOCK_D):
        y = load_rows(x, n, begin + tl.arange(0, BLOCK_D)).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(y), axis=1))
        squares += tl.sum(y * y, axis=1)
    return largest, squares

"""Matrix products of tiles on the matrix units, with errors as in float32 (docs/numerics.md, section 9.2)."""

from __future__ import annotations

import triton
import triton.language as tl

from ..architectures import INTERPRETED

# The interpreter has no matrix units and no bfloat16: it multiplies in float32.
UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b on the matrix units."""
    if UPCAST:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc=total, input_precision=PRECISION)


@triton.jit
def multiply(a, b, total, HALF: tl.constexpr):
    """total + a @ b. HALF: b is of half precision and the numbers of a are exact in it."""
    if HALF and not UPCAST:
        return product(a.to(b.dtype), b, total, "ieee")
    # Three TF32 products of high and low terms have the error of float32.
    return product(a.to(tl.float32), b.to(tl.float32), total, "tf32x3")


@triton.jit
def multiply_sums(a, b, total, HALF: tl.constexpr):
    """total + a @ b. HALF: b is of half precision and the numbers of a are sums of numbers of half precision."""
    if UPCAST or not HALF:
        return multiply(a, b, total, HALF)
    high = a
    if b.dtype == tl.float16:
        high = tl.minimum(tl.maximum(a, -65504.0), 65504.0)
    high = high.to(b.dtype)
    total = tl.dot(high, b, acc=total)
    return tl.dot((a - high.to(tl.float32)).to(b.dtype), b, acc=total)


@triton.jit
def sum_marked(marks, x, total, TERMS: tl.constexpr):
    """total + marks @ x for boolean marks.

    Marks are exact in bfloat16. A float32 x is the sum of up to three bfloat16 TERMS.
    """
    if UPCAST:
        total += tl.dot(marks.to(tl.float32), x.to(tl.float32), input_precision="ieee")
    elif x.dtype != tl.float32:
        total = tl.dot(marks.to(x.dtype), x, acc=total)
    else:
        marks = marks.to(tl.bfloat16)
        for _ in tl.static_range(TERMS):
            # An infinite term would become NaN times 0: the largest bfloat16 bounds it.
            term = tl.minimum(tl.maximum(x, -3.3895e38), 3.3895e38).to(tl.bfloat16)
            x -= term.to(tl.float32)
            total = tl.dot(marks, term, acc=total)
    return total


@triton.jit
def replace_non_finite(a, b, total):
    """b with 0 in place of NaN and infinity, and total with NaN where a nonzero of a meets them in a @ b.

    A matrix unit would return NaN for 0 times infinity, also in the rows of a that are 0 there.
    """
    bits = b.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if tl.max(tl.max(bits, axis=1), axis=0) >= 0x7F800000:
        is_finite = tl.abs(b.to(tl.float32)) < float("inf")
        meets = tl.dot((a != 0).to(tl.float16), (is_finite == 0).to(tl.float16))
        total = tl.where(meets > 0, float("nan"), total)
        b = tl.where(is_finite, b.to(tl.float32), 0.0).to(b.dtype)
    return b, total

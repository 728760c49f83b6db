"""Products of tiles on the matrix units, as exact as in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(x, c, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + x c on the matrix units; in float32 where there are none."""
    if UPCAST:
        return acc + tl.dot(x.to(tl.float32), c.to(tl.float32), input_precision="ieee")
    return tl.dot(x, c, acc=acc, input_precision=PRECISION)


@triton.jit
def multiply(a, b, total, HALF: tl.constexpr, UPCAST: tl.constexpr):
    """total + a @ b; HALF: b is of half precision, and so is what a holds."""
    if HALF and not UPCAST:
        return product(a.to(b.dtype), b, total, "ieee", UPCAST)
    # Three products of parts on the matrix units round as float32 does.
    return product(a.to(tl.float32), b.to(tl.float32), total, "tf32x3", UPCAST)


@triton.jit
def multiply_sums(a, b, total, HALF: tl.constexpr, UPCAST: tl.constexpr):
    """As `multiply`, where a holds sums of two or more numbers of half precision."""
    if UPCAST or not HALF:
        return multiply(a, b, total, HALF, UPCAST)
    high = a
    if b.dtype == tl.float16:
        high = tl.minimum(tl.maximum(a, -65504.0), 65504.0)
    high = high.to(b.dtype)
    total = tl.dot(high, b, acc=total)
    return tl.dot((a - high.to(tl.float32)).to(b.dtype), b, acc=total)


@triton.jit
def sum_marked(marks, x, total, TERMS: tl.constexpr, UPCAST: tl.constexpr):
    """total + marks @ x for 0-1 marks; those are exact in bfloat16, as a float32 is in three TERMS."""
    if UPCAST:
        total += tl.dot(marks.to(tl.float32), x.to(tl.float32), input_precision="ieee")
    elif x.dtype != tl.float32:
        total = tl.dot(marks.to(x.dtype), x, acc=total)
    else:
        marks = marks.to(tl.bfloat16)
        for _ in tl.static_range(TERMS):
            # The largest bfloat16: beyond it a product with 0 would be NaN.
            part = tl.minimum(tl.maximum(x, -3.3895e38), 3.3895e38).to(tl.bfloat16)
            x -= part.to(tl.float32)
            total = tl.dot(marks, part, acc=total)
    return total


@triton.jit
def set_apart(a, b, total):
    """b without what is not finite, and total with NaN where a product a @ b meets it: 0 times NaN is then 0."""
    bits = b.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if tl.max(tl.max(bits, axis=1), axis=0) >= 0x7F800000:
        is_finite = tl.abs(b.to(tl.float32)) < float("inf")
        meets = tl.dot((a != 0).to(tl.float16), (is_finite == 0).to(tl.float16))
        total = tl.where(meets > 0, float("nan"), total)
        b = tl.where(is_finite, b.to(tl.float32), 0.0).to(b.dtype)
    return b, total

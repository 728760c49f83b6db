"""Powers of two that scale vectors and codes, and the two float16 terms of a scaled float32.

docs/numerics.md derives the scales (section 3) and the error of the terms (section 4.1). A kernel reads what the scales
depend on from `extremes` [4] int32, the extremes of all codes: see `search/codebook_terms.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The exponent of the largest feature of the codebook, and of a vector, after scaling.
TARGET_EXPONENT = tl.constexpr(14)
# A larger power of two would overflow where two scales are multiplied.
_LARGEST_SHIFT = tl.constexpr(120)


@triton.jit
def power_of_two(exponent):
    """2.0**exponent, for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(value):
    """The exponent of a float32 >= 0; -127 for 0 and subnormal numbers, 128 for infinity and NaN."""
    return (value.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def split_terms(x, scale):
    """The high and the low float16 term of the float32 x * scale."""
    # Clipping to the largest float16 keeps NaN.
    scaled = tl.minimum(tl.maximum(x * scale, -65504.0, tl.PropagateNan.ALL), 65504.0, tl.PropagateNan.ALL)
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def shift_to_target(exponent):
    """The exponent of the scale that brings numbers of an exponent to TARGET_EXPONENT."""
    return tl.minimum(-exponent + TARGET_EXPONENT, _LARGEST_SHIFT)


@triton.jit
def code_exponent(extremes_ptr):
    """The largest exponent of a feature of a code that has a score."""
    return tl.load(extremes_ptr)


@triton.jit
def first_number_code(extremes_ptr):
    """The index of the first code without NaN; K where there is none."""
    return -tl.load(extremes_ptr + 1)


@triton.jit
def bias_exponent(extremes_ptr):
    """The largest exponent of |c|^2 / 2 and of |bias|."""
    return tl.load(extremes_ptr + 2)


@triton.jit
def codebook_shift(extremes_ptr):
    """The exponent of the scale of float32 codes."""
    return shift_to_target(code_exponent(extremes_ptr))


@triton.jit
def bias_shift(extremes_ptr):
    """The exponent of the scale of the bias of packed codes."""
    return shift_to_target(bias_exponent(extremes_ptr))


@triton.jit
def vector_shift(largest):
    """The exponent of a scale for each vector by itself, from the largest magnitude of its features."""
    return shift_to_target(exponent_of(largest))


@triton.jit
def block_shift(largest, extremes_ptr, PACKED: tl.constexpr):
    """The exponent of one scale for a block of vectors, from the largest magnitudes of their features [BLOCK_N].

    The error of the terms of a short vector is small beside |c| as long as no vector of the block is more than 2^19
    times as long as the codes. All distances of such a vector tie in float32, and its features are clipped.
    """
    finite = tl.max(tl.where(largest < float("inf"), largest, 0.0), axis=0)
    shift = -tl.minimum(exponent_of(finite), code_exponent(extremes_ptr) + 19) + TARGET_EXPONENT
    # A larger scale would overflow the scaled bias.
    shift = tl.minimum(tl.minimum(shift, 120), 120 - bias_exponent(extremes_ptr) - codebook_shift(extremes_ptr))
    if PACKED:
        # A larger scale would overflow the float16 factor of the packed bias.
        shift = tl.minimum(shift, bias_shift(extremes_ptr) - codebook_shift(extremes_ptr) + 15)
    return shift

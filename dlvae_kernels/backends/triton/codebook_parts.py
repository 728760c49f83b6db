"""A codebook as the search reads it: padded, in parts, with a bias for each code.

The bias is -|c|^2 / 2, or what is given beside an inner product. float32 codes become two float16 parts,
c * 2^shift = high + low, with one power of two for the whole codebook that brings its largest feature to about 2^14.
What is lost is 2^-22 of a feature, or 2^-39 of the largest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import SearchConfig, TopkConfig

# The bias of codes that must not win: padding, and those whose norm is NaN or infinite.
NEVER = tl.constexpr(float("-inf"))
# Of the largest feature of codes and rows, once scaled.
TARGET_EXPONENT = tl.constexpr(14)
_LARGEST_SHIFT = tl.constexpr(120)
# By so many the unit of a part of a packed bias is finer than that of the part before.
FINER_BITS = tl.constexpr(9)
_META = 3
# Below all exponents, above the negative of no number of codes.
_UNSET = -(2**30)
# Divides every padded number of features.
_BLOCK_D = 16


@dataclass(frozen=True)
class CodebookParts:
    """high, low: [K padded, D padded], low only of float32 codes.

    bias: [K padded], times 2^shift of such codes unless asked otherwise.

    Packed: high is [K padded, 32], of each code high, high and low parts and three parts of the bias.

    norms: [K padded], |c|; infinite where only its square overflows, NaN of a code that is not finite, and beyond K.

    meta: int32, the largest exponent of a feature, minus the first code that is not NaN, the largest exponent of a
    bias; of codes of which none is finite the exponents are -127.
    """

    high: Tensor
    low: Tensor
    bias: Tensor
    norms: Tensor
    meta: Tensor


@triton.jit
def power_of_two(exponent):
    """2.0**exponent, for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(value):
    """The exponent of a float32 >= 0: -127 of 0 and of subnormal numbers, 128 of infinity and NaN."""
    return (value.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def split(x, scale):
    """The float32 x * scale as a sum of two float16 parts."""
    # Within float16, of which 65504 is the largest; NaN stays.
    scaled = tl.minimum(tl.maximum(x * scale, -65504.0, tl.PropagateNan.ALL), 65504.0, tl.PropagateNan.ALL)
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def codebook_shift(meta_ptr):
    """The power of two by which float32 codes are scaled."""
    return tl.minimum(-tl.load(meta_ptr) + TARGET_EXPONENT, _LARGEST_SHIFT)


@triton.jit
def bias_shift(meta_ptr):
    """The power of two by which the bias of packed codes is scaled."""
    return tl.minimum(-tl.load(meta_ptr + 2) + TARGET_EXPONENT, _LARGEST_SHIFT)


@triton.jit
def own_shift(largest):
    """The power of two that scales a row, of which `largest` is the largest feature, by itself."""
    return tl.minimum(-exponent_of(largest) + TARGET_EXPONENT, _LARGEST_SHIFT)


@triton.jit
def row_shift(largest, meta_ptr, PACKED: tl.constexpr):
    """The power of two that scales a block of rows, of which `largest` is the largest finite feature.

    One for the whole block: what rows smaller than its largest lose is nothing beside |c|, as long as no row is 2^19
    times as long as the codes. Of one that is, all distances tie in float32; it is cut off instead.
    """
    of_codes = tl.load(meta_ptr)
    shift = -tl.minimum(exponent_of(largest), of_codes + 19) + TARGET_EXPONENT
    # Not so much that the scaled bias overflows, or the factor of a packed one: beside such codes x is nothing.
    shift = tl.minimum(tl.minimum(shift, 120), 120 - tl.load(meta_ptr + 2) - codebook_shift(meta_ptr))
    if PACKED:
        shift = tl.minimum(shift, bias_shift(meta_ptr) - codebook_shift(meta_ptr) + 15)
    return shift


@triton.jit
def _bias_kernel(
    codes_ptr,
    given_ptr,
    bias_ptr,
    norm_ptr,
    meta_ptr,
    num_codes,
    num_features,
    stride_k,
    stride_d,
    DOT: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Bias and length of each code, and the extremes that all codes are scaled by."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float32)
    largest = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        offsets = k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
        mask = (k < num_codes)[:, None] & (d < num_features)[None, :]
        c = tl.load(codes_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(c * c, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(c), axis=1))
    half = 0.5 * total
    bias = -half
    given = tl.zeros([BLOCK_K], tl.float32)
    if DOT:
        bias = given
        if GIVEN:
            bias = tl.load(given_ptr + k, mask=k < num_codes, other=0.0).to(tl.float32)
        # As little finite as either of the two.
        given = tl.abs(bias)
        half = tl.maximum(half, given, tl.PropagateNan.ALL)
    is_nan = half != half
    is_finite = half < float("inf")
    tl.atomic_max(meta_ptr, tl.max(tl.where(is_finite, exponent_of(largest), -127), axis=0))
    tl.atomic_max(meta_ptr + 1, -tl.min(tl.where(is_nan | (k >= num_codes), num_codes, k), axis=0))
    tl.atomic_max(meta_ptr + 2, tl.max(tl.where(is_finite, exponent_of(half), -127), axis=0))
    tl.store(bias_ptr + k, tl.where(is_finite & (k < num_codes), bias, NEVER))
    # Of a code that is finite, but not its square, nothing is known.
    is_open = (total == float("inf")) & (largest < float("inf")) & (given < float("inf"))
    norm = tl.where(is_finite, tl.sqrt(total), tl.where(is_open, float("inf"), float("nan")))
    tl.store(norm_ptr + k, tl.where(k < num_codes, norm, float("nan")))


@triton.jit
def _codebook_parts_kernel(
    codes_ptr,
    high_ptr,
    low_ptr,
    bias_ptr,
    meta_ptr,
    num_codes,
    num_features,
    stride_k,
    stride_d,
    padded,
    SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
    SCALES_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Padded parts of the codes; those that are not finite become 0: their bias tells them."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    bias = tl.load(bias_ptr + k)
    is_finite = (bias > NEVER)[:, None]
    shift = codebook_shift(meta_ptr)
    for begin in range(0, padded, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        d = column
        if PACKED:
            d = column % num_features
        offsets = k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
        mask = (k < num_codes)[:, None] & (d < num_features)[None, :] & is_finite
        c = tl.load(codes_ptr + offsets, mask=mask, other=0.0)
        out = k.to(tl.int64)[:, None] * padded + column[None, :]
        if PACKED:
            high, low = split(c.to(tl.float32), power_of_two(shift))
            rest = bias * power_of_two(bias_shift(meta_ptr))
            value = tl.where((column < 2 * num_features)[None, :], high, low)
            # 2^FINER_BITS a part.
            finer = 1.0
            for part in tl.static_range(3):
                # Each in a finer unit, as the smallest float16 would be too large beside a long code.
                piece = (rest * finer).to(tl.float16)
                rest = tl.where(rest > NEVER, rest - piece.to(tl.float32) / finer, 0.0)
                value = tl.where((column == 3 * num_features + part)[None, :], piece[:, None], value)
                finer *= 512.0
            tl.store(high_ptr + out, tl.where((column < 3 * num_features + 3)[None, :], value, 0.0))
        elif SPLIT:
            high, low = split(c.to(tl.float32), power_of_two(shift))
            tl.store(high_ptr + out, high)
            tl.store(low_ptr + out, low)
        else:
            tl.store(high_ptr + out, c.to(high_ptr.dtype.element_ty))
    if SCALES_BIAS:
        tl.store(bias_ptr + k, bias * power_of_two(shift))


def codebook_parts(
    codebook: Tensor,
    config: SearchConfig | TopkConfig,
    dtype: torch.dtype,
    splits: bool,
    metric: str = "l2",
    given: Tensor | None = None,
    scales_bias: bool = True,
) -> CodebookParts:
    """The parts of a codebook [K, D] on the current device.

    They are made at each call: a write through `.data`, the replay of a captured graph and a buffer that a compiled
    program uses again leave no trace by which old parts could be told to be stale.

    Args:
        dtype: of the parts: float16 where float32 codes are split, else that of the product.
        scales_bias: by the power of two of float32 codes.
        metric: "l2" with a bias of -|c|^2 / 2, or "dot" with the bias that is given [K], or none.
    """
    num_codes, num_features = codebook.shape
    padded, block = config.padded(num_features), config.block_k
    programs = triton.cdiv(num_codes, block)
    high = torch.empty(programs * block, padded, dtype=dtype, device=codebook.device)
    low = torch.empty_like(high) if splits and not config.packed else high
    bias, norms = torch.empty(2, programs * block, dtype=torch.float32, device=codebook.device)
    meta = torch.full((_META,), _UNSET, dtype=torch.int32, device=codebook.device)
    sizes = (num_codes, num_features, *codebook.stride())
    _bias_kernel[(programs,)](
        codebook,
        bias if given is None else given,
        bias,
        norms,
        meta,
        *sizes,
        DOT=metric == "dot",
        GIVEN=given is not None,
        BLOCK_K=block,
        BLOCK_D=_BLOCK_D,
    )
    _codebook_parts_kernel[(programs,)](
        codebook,
        high,
        low,
        bias,
        meta,
        *sizes,
        padded,
        SPLIT=splits,
        PACKED=config.packed,
        SCALES_BIAS=splits and scales_bias and not config.packed,
        BLOCK_K=block,
        BLOCK_D=_BLOCK_D,
    )
    return CodebookParts(high, low, bias, norms, meta)

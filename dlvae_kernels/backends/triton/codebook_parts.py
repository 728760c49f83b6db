"""A codebook as the search reads it: padded, in parts, with a bias for each code; kept while the codebook is unchanged.

The bias is -|c|^2 / 2. float32 codes become two float16 parts, c * 2^shift = high + low, with one power of two for the
whole codebook that brings its largest feature to about 2^14. What is lost is 2^-22 of a feature, or 2^-39 of the
largest one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .tuning import SearchConfig, on_device

# The bias of codes that must not win: padding, and those whose norm is NaN or infinite.
NEVER = tl.constexpr(float("-inf"))
# Of the largest feature of codes and rows, once scaled.
TARGET_EXPONENT = tl.constexpr(14)
_LARGEST_SHIFT = tl.constexpr(120)
_META = 3
# Divides every padded number of features.
_BLOCK_D = 16
_KEPT = 8


@dataclass(frozen=True)
class CodebookParts:
    """high, low: [K padded, D padded], low only of float32 codes; bias: [K padded], times 2^shift of such codes.

    Packed: high is [K padded, 32], of each code high, high and low parts and three parts of the bias.

    meta: int32, the largest exponent of a feature, the first code that is not NaN, the largest exponent of a bias.
    """

    high: Tensor
    low: Tensor
    bias: Tensor
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
def _bias_kernel(
    codes_ptr,
    bias_ptr,
    meta_ptr,
    num_codes,
    num_features,
    stride_k,
    stride_d,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """-|c|^2 / 2 of each code, and the extremes that all codes are scaled by."""
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
    is_nan = half != half
    is_finite = half < float("inf")
    exponents = tl.where(is_finite, exponent_of(largest), -127)
    tl.atomic_max(meta_ptr, tl.max(exponents, axis=0))
    tl.atomic_min(meta_ptr + 1, tl.min(tl.where(is_nan | (k >= num_codes), num_codes, k), axis=0))
    tl.atomic_max(meta_ptr + 2, tl.max(tl.where(is_finite, exponent_of(half), -127), axis=0))
    tl.store(bias_ptr + k, tl.where(is_finite & (k < num_codes), -half, NEVER))


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
            for part in tl.static_range(3):
                piece = rest.to(tl.float16)
                rest = tl.where(rest > NEVER, rest - piece.to(tl.float32), 0.0)
                value = tl.where((column == 3 * num_features + part)[None, :], piece[:, None], value)
            tl.store(high_ptr + out, tl.where((column < 3 * num_features + 3)[None, :], value, 0.0))
        elif SPLIT:
            high, low = split(c.to(tl.float32), power_of_two(shift))
            tl.store(high_ptr + out, high)
            tl.store(low_ptr + out, low)
        else:
            tl.store(high_ptr + out, c.to(high_ptr.dtype.element_ty))
    if SPLIT:
        tl.store(bias_ptr + k, bias * power_of_two(shift))


_cache: OrderedDict[tuple, tuple[StorageWeakRef, CodebookParts]] = OrderedDict()


def codebook_parts(codebook: Tensor, config: SearchConfig, dtype: torch.dtype, splits: bool) -> CodebookParts:
    """The parts of a codebook [K, D], new or kept from the last call that saw it as it is.

    Args:
        dtype: of the parts: float16 where float32 codes are split, else that of the product.
    """
    # Inference tensors do not count their changes, and a graph under capture must make its own at each replay.
    capturing = codebook.is_cuda and torch.cuda.is_current_stream_capturing()
    if codebook.is_inference() or capturing:
        return _make(codebook, config, dtype, splits)
    # While a weak reference to a storage lives, no other storage has its address.
    storage = StorageWeakRef(codebook.untyped_storage())
    layout = (codebook.storage_offset(), codebook.shape, codebook.stride(), codebook.dtype, codebook.device)
    # What one stream made, another could read too early.
    stream = torch.cuda.current_stream(codebook.device).stream_id if codebook.is_cuda else 0
    key = (storage.cdata, codebook._version, layout, config, dtype, splits, stream)
    if key in _cache:
        _cache.move_to_end(key)
        return _cache[key][1]
    for old, (reference, _) in list(_cache.items()):
        if reference.expired() or (reference.cdata == storage.cdata and old[1] != codebook._version):
            del _cache[old]
    parts = _make(codebook, config, dtype, splits)
    _cache[key] = (storage, parts)
    if len(_cache) > _KEPT:
        _cache.popitem(last=False)
    return parts


def _make(codebook: Tensor, config: SearchConfig, dtype: torch.dtype, splits: bool) -> CodebookParts:
    num_codes, num_features = codebook.shape
    padded, block = config.padded(num_features), config.block_k
    programs = triton.cdiv(num_codes, block)
    high = torch.empty(programs * block, padded, dtype=dtype, device=codebook.device)
    low = torch.empty_like(high) if splits and not config.packed else high
    bias = torch.empty(programs * block, dtype=torch.float32, device=codebook.device)
    meta = torch.full((_META,), -127, dtype=torch.int32, device=codebook.device)
    meta[1:2].fill_(num_codes)
    sizes = (num_codes, num_features, *codebook.stride())
    with on_device(codebook):
        _bias_kernel[(programs,)](codebook, bias, meta, *sizes, BLOCK_K=block, BLOCK_D=_BLOCK_D)
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
            BLOCK_K=block,
            BLOCK_D=_BLOCK_D,
        )
    return CodebookParts(high, low, bias, meta)

"""The codebook as the matrix units read it: padded, in float16 terms, with a bias for each code.

The bias is -|c|^2 / 2 for distances, or that of an inner product. A float32 code becomes two float16 terms of
c * 2^shift, with one shift for the whole codebook: see `language/scaling.py`. With heads, each has a codebook, whose K
is padded by itself, and the terms of all codebooks follow one another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language.rows import Codes, codes_of_head, head_of_program, load_codes_where
from ..language.scaling import exponent_of, power_of_two, shift_to_target, split_terms

# The bias of codes without a score: padding, and codes whose |c|^2 or given bias is NaN or infinite in float32.
NEVER = tl.constexpr(float("-inf"))
# Each float16 term of a packed bias has a unit 2^9 times as fine as the term before.
FINER_BITS = tl.constexpr(9)
NUM_EXTREMES = tl.constexpr(4)
# Below every exponent and every negated index.
_UNSET = tl.constexpr(-(2**30))
# A divisor of every padded number of features.
_BLOCK_D = 16


class CodebookTerms(NamedTuple):
    """The terms of a codebook, or of H codebooks, one for each head; then K padded and 4 stand for H times as many.

    high, low: [K padded, D padded]; low is high where one term is enough. Packed, high is [K padded, 32] and holds for
        each code the high, high and low terms and three terms of the bias.
    bias: [K padded] float32; times 2^shift if `scales_bias`.
    norms: [K padded] float32 |c|: infinite where a code and its given bias are finite and |c|^2 overflows; NaN for any
        other code without a score (see `NEVER`), and for padding.
    extremes: [4] int32: the largest exponent of a feature, minus the index of the first code without NaN, the largest
        exponent of |c|^2 / 2 and of |bias|, and 0, from which a later kernel may count. Both exponents are -127 if no
        code has a score.
    """

    high: Tensor
    low: Tensor
    bias: Tensor
    norms: Tensor
    extremes: Tensor


@triton.jit
def _bias_kernel(
    codes,
    given_ptr,
    bias_ptr,
    norm_ptr,
    block_extremes_ptr,
    count_ptr,
    DOT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the bias and the norm of each code, the extremes of each block of codes, and counts of 0."""
    head = head_of_program(codes)
    codes = codes_of_head(codes, head)
    bias_ptr += head * tl.num_programs(0) * BLOCK_K
    norm_ptr += head * tl.num_programs(0) * BLOCK_K
    extremes_ptr = block_extremes_ptr + (head * tl.num_programs(0) + tl.program_id(0)) * NUM_EXTREMES
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_code = k < codes.num_codes
    total = tl.zeros([BLOCK_K], tl.float32)
    largest = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, codes.num_features, BLOCK_D):
        c = load_codes_where(codes, k, is_code, begin + tl.arange(0, BLOCK_D)).to(tl.float32)
        total += tl.sum(c * c, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(c), axis=1))
    half = 0.5 * total
    bias = -half
    given = tl.zeros([BLOCK_K], tl.float32)
    if DOT:
        bias = given
        if given_ptr is not None:
            bias = tl.load(given_ptr + k, mask=is_code, other=0.0).to(tl.float32)
        # A code has a score if its |c|^2 and its bias are finite.
        given = tl.abs(bias)
        half = tl.maximum(half, given, tl.PropagateNan.ALL)
    is_finite = half < float("inf")
    first_number = tl.min(tl.where((half == half) & is_code, k, codes.num_codes), axis=0)
    tl.store(extremes_ptr, tl.max(tl.where(is_finite, exponent_of(largest), -127), axis=0))
    tl.store(extremes_ptr + 1, -first_number)
    tl.store(extremes_ptr + 2, tl.max(tl.where(is_finite, exponent_of(half), -127), axis=0))
    tl.store(extremes_ptr + 3, 0)
    tl.store(bias_ptr + k, tl.where(is_finite & is_code, bias, NEVER))
    is_too_long = (total == float("inf")) & (largest < float("inf")) & (given < float("inf"))
    norm = tl.where(is_finite, tl.sqrt(total), tl.where(is_too_long, float("inf"), float("nan")))
    tl.store(norm_ptr + k, tl.where(is_code, norm, float("nan")))
    if count_ptr is not None:
        tl.store(count_ptr + head * codes.num_codes + k, tl.zeros([BLOCK_K], tl.int64), mask=is_code)


@triton.jit
def _join_extremes(block_extremes_ptr, num_blocks):
    """The extremes [4] of a codebook from those of its blocks of codes."""
    which = tl.arange(0, NUM_EXTREMES)[None, :]
    most = tl.full([NUM_EXTREMES], _UNSET, tl.int32)
    for begin in range(0, num_blocks, 256):
        block = begin + tl.arange(0, 256)[:, None]
        extremes = tl.load(block_extremes_ptr + block * NUM_EXTREMES + which, mask=block < num_blocks, other=_UNSET)
        most = tl.maximum(most, tl.max(extremes, axis=0))
    return most


@triton.jit
def _packed_columns(c, bias, column, num_features, shift, bias_shift):
    """The columns [high, high, low, bias_0, bias_1, bias_2] of codes (docs/numerics.md, section 7.4)."""
    high, low = split_terms(c.to(tl.float32), power_of_two(shift))
    value = tl.where((column < 2 * num_features)[None, :], high, low)
    rest = bias * power_of_two(bias_shift)
    # The unit of a term is 2^(FINER_BITS * term) = `finer` times as fine as that of the first.
    finer = 1.0
    for term in tl.static_range(3):
        piece = (rest * finer).to(tl.float16)
        rest = tl.where(rest > NEVER, rest - piece.to(tl.float32) / finer, 0.0)
        value = tl.where((column == 3 * num_features + term)[None, :], piece[:, None], value)
        finer *= 512.0
    return tl.where((column < 3 * num_features + 3)[None, :], value, 0.0)


@triton.jit
def _codebook_terms_kernel(
    codes,
    high_ptr,
    low_ptr,
    bias_ptr,
    block_extremes_ptr,
    extremes_ptr,
    padded,
    TWO_TERMS: tl.constexpr,
    PACKED: tl.constexpr,
    SCALES_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the padded terms of the codes; a code without a score becomes 0, and its bias excludes it.

    The programs are those of `_bias_kernel`. The first of each codebook writes its extremes.
    """
    head = head_of_program(codes)
    codes = codes_of_head(codes, head)
    which = tl.arange(0, NUM_EXTREMES)
    blocks = tl.num_programs(0)
    extremes = _join_extremes(block_extremes_ptr + head * blocks * NUM_EXTREMES, blocks)
    tl.store(extremes_ptr + head * NUM_EXTREMES + which, extremes, mask=tl.program_id(0) == 0)
    shift = shift_to_target(tl.max(tl.where(which == 0, extremes, _UNSET), axis=0))
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    place = head * tl.num_programs(0) * BLOCK_K + k
    bias = tl.load(bias_ptr + place)
    is_finite = bias > NEVER
    bias_shift = shift_to_target(tl.max(tl.where(which == 2, extremes, _UNSET), axis=0))
    for begin in range(0, padded, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        out = place.to(tl.int64)[:, None] * padded + column[None, :]
        if PACKED:
            c = load_codes_where(codes, k, is_finite, column % codes.num_features)
            tl.store(high_ptr + out, _packed_columns(c, bias, column, codes.num_features, shift, bias_shift))
        elif TWO_TERMS:
            c = load_codes_where(codes, k, is_finite, column)
            high, low = split_terms(c.to(tl.float32), power_of_two(shift))
            tl.store(high_ptr + out, high)
            tl.store(low_ptr + out, low)
        else:
            c = load_codes_where(codes, k, is_finite, column)
            tl.store(high_ptr + out, c.to(high_ptr.dtype.element_ty))
    if SCALES_BIAS:
        tl.store(bias_ptr + place, bias * power_of_two(shift))


def codebook_terms(
    codes: Codes,
    *,
    padded: int,
    block_k: int,
    dtype: torch.dtype,
    two_terms: bool,
    packed: bool = False,
    scales_bias: bool = True,
    metric: str = "l2",
    bias: Tensor | None = None,
    counts: Tensor | None = None,
) -> CodebookTerms:
    """The terms of a codebook on the current device.

    They are computed at each call. A cache could not tell when they are out of date: a write through `.data`, the
    replay of a captured graph and a buffer that a compiled program uses again leave no trace.

    Args:
        padded: D rounded up to whole blocks.
        block_k: the number to a multiple of which K is padded.
        dtype: the dtype of the terms: float16 where float32 codes have two, else that of the product.
        scales_bias: whether the bias has the scale of the terms.
        metric: "l2" with the bias -|c|^2 / 2, or "dot".
        bias: [K], the bias of "dot", or None for 0.
        counts: int64, one for each code, which a kernel sets to 0 in passing; or None.
    """
    programs, heads = triton.cdiv(codes.num_codes, block_k), codes.heads
    device = codes.tensor.device
    high = torch.empty(heads * programs * block_k, padded, dtype=dtype, device=device)
    low = torch.empty_like(high) if two_terms and not packed else high
    biases, norms = torch.empty(2, heads * programs * block_k, dtype=torch.float32, device=device)
    extremes = torch.empty(heads, NUM_EXTREMES.value, dtype=torch.int32, device=device)
    block_extremes = torch.empty(heads, programs, NUM_EXTREMES.value, dtype=torch.int32, device=device)
    _bias_kernel[(programs, 1, heads)](
        codes, bias, biases, norms, block_extremes, counts, DOT=metric == "dot", BLOCK_K=block_k, BLOCK_D=_BLOCK_D
    )
    _codebook_terms_kernel[(programs, 1, heads)](
        codes,
        high,
        low,
        biases,
        block_extremes,
        extremes,
        padded,
        TWO_TERMS=two_terms,
        PACKED=packed,
        SCALES_BIAS=two_terms and scales_bias and not packed,
        BLOCK_K=block_k,
        BLOCK_D=_BLOCK_D,
    )
    return CodebookTerms(high, low, biases, norms, extremes)

"""The certificate of `precision="exact"`: the bound of the error of scores, and the search of uncertain vectors.

A vector is uncertain if its two best scores differ by no more than the bound. It is compared with all codes by
differences in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..language.rows import Codes, Rows, codes_of_head, load_codes_where, row_offsets
from ..language.scaling import bias_exponent, codebook_shift, power_of_two, vector_shift
from .codebook_terms import NUM_EXTREMES

# The relative error of a score, of |x| |c| + |c|^2 / 2, times 1 + D / 85: docs/numerics.md, section 7.2.
ERROR = tl.constexpr(2.0**-19)
_PROGRAMS = 1024
_NO_CODE = tl.constexpr(2147483647)


@triton.jit
def error_bound(largest, squares, scale, extremes_ptr, num_features, TWO_TERMS: tl.constexpr):
    """The error bound of the difference of two scores of a vector, in the unit of scores: [BLOCK_N].

    Args:
        largest, squares: the largest magnitude of a feature and the sum of squares of each vector.
        scale: the scale of the block of vectors.
    """
    features = tl.cast(num_features, tl.float32)
    # The largest bias |c|^2 / 2, rounded up to a power of two, bounds every |c|.
    bias = power_of_two(tl.minimum(bias_exponent(extremes_ptr) + 1, 127))
    norm = tl.sqrt(2.0 * bias)
    code_scale = 1.0
    if TWO_TERMS:
        code_scale = power_of_two(codebook_shift(extremes_ptr))
    error = 2.0 * ERROR * (1.0 + features / 85.0)
    bound = ((tl.sqrt(squares) * scale) * (norm * code_scale) + (bias * code_scale) * scale) * error
    if TWO_TERMS:
        # The terms of a vector that is short beside the longest of its block err by 2^-25 of a unit each.
        bound += 2.0**-23 * tl.sqrt(features) * (norm * code_scale)
        # A feature beyond the range of float16 was clipped: the error has no bound.
        bound = tl.where(largest * scale < 2.0**15, bound, float("inf"))
    return bound


@triton.jit
def _load_features(x, start, d):
    """Features d of the vector that begins at `start`, [BLOCK_D] float32."""
    return tl.load(x.tensor + start + d.to(tl.int64) * x.stride_d, mask=d < x.num_features, other=0.0).to(tl.float32)


@triton.jit
def _nearest_of_all(x, codes, extremes_ptr, n, distance_weight, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """The nearest code of vector n, by differences with all codes of its codebook, -1 if no distance is finite.

    The second result is the squared distance times `distance_weight`.
    """
    start = row_offsets(x, n)
    # The scale keeps the squares of codes and of the vector in the range of float32.
    largest = tl.zeros([], tl.float32)
    for begin in range(0, x.num_features, BLOCK_D):
        y = _load_features(x, start, begin + tl.arange(0, BLOCK_D))
        largest = tl.maximum(largest, tl.max(tl.abs(y), axis=0))
    shift = tl.minimum(codebook_shift(extremes_ptr), vector_shift(largest))
    scale = power_of_two(shift)
    best = tl.full([], float("inf"), tl.float32)
    index = tl.full([], -1, tl.int32)
    for first in range(0, codes.num_codes, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        is_code = k < codes.num_codes
        distance = tl.zeros([BLOCK_K], tl.float32)
        for begin in range(0, x.num_features, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            y = _load_features(x, start, d)
            difference = (y[None, :] - load_codes_where(codes, k, is_code, d).to(tl.float32)) * scale
            distance += tl.sum(difference * difference, axis=1)
        distance = tl.where(is_code & (distance == distance), distance, float("inf"))
        smallest = tl.min(distance, axis=0)
        if smallest < best:
            best = smallest
            index = tl.min(tl.where(distance == smallest, k, _NO_CODE), axis=0)
    unit = power_of_two(-shift)
    return index, best * distance_weight * unit * unit


@triton.jit
def _rescan_kernel(
    x,
    codes,
    extremes_ptr,
    index_ptr,
    distance_ptr,
    worklist_ptr,
    count_ptr,
    distance_weight,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compare each vector of the worklist with all codes; program p takes every P-th vector from the p-th on."""
    count = tl.load(count_ptr)
    for place in range(tl.program_id(0), count, tl.num_programs(0)):
        n = tl.load(worklist_ptr + place)
        head = 0
        if codes.num_heads is not None:
            head = n % codes.num_heads
        of_head, extremes_of_head = codes_of_head(codes, head), extremes_ptr + head * NUM_EXTREMES
        index, distance = _nearest_of_all(x, of_head, extremes_of_head, n, distance_weight, BLOCK_K, BLOCK_D)
        # A vector without a finite distance keeps the code and the distance that it has.
        tl.store(index_ptr + n, index.to(tl.int64), mask=index >= 0)
        tl.store(distance_ptr + n, distance, mask=index >= 0)


@triton.jit
def search_again(
    x,
    codes,
    extremes_ptr,
    n,
    index,
    distance,
    is_uncertain,
    distance_weight,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Indices and distances of vectors n [BLOCK_N], after a search of the uncertain ones by differences."""
    while tl.max(is_uncertain.to(tl.int32), axis=0) > 0:
        vector = tl.min(tl.where(is_uncertain, n, 2147483647), axis=0)
        nearest, least = _nearest_of_all(x, codes, extremes_ptr, vector, distance_weight, BLOCK_K, BLOCK_D)
        found = tl.where(n == vector, nearest, -1)
        index = tl.where(found >= 0, found, index)
        distance = tl.where(found >= 0, least, distance)
        is_uncertain = is_uncertain & (n != vector)
    return index, distance


def rescan(
    x: Rows,
    codes: Codes,
    extremes: Tensor,
    indices: Tensor,
    distances: Tensor,
    worklist: Tensor,
    count: Tensor,
    distance_weight: float,
) -> None:
    """Overwrite indices and distances of the vectors of a worklist.

    Args:
        extremes: those of the codebook's terms.
        count: [1], the length of the worklist.
        distance_weight: the factor of the squared distances that are written.
    """
    _rescan_kernel[(min(x.num_vectors, _PROGRAMS),)](
        x,
        codes,
        extremes,
        indices,
        distances,
        worklist,
        count,
        distance_weight,
        BLOCK_K=64,
        BLOCK_D=32,
        maxnreg=128,
    )

"""The kernel behind `nearest_code` and `vector_quantize`: tiles of codes stream past a block of vectors.

The score is x . c - |c|^2 / 2, the negative of that of docs/numerics.md, section 2; the largest belongs to the nearest
code. A float32 product is three products of float16 terms on the matrix units (sections 4.1 and 7). A thread holds the
codes 2i, 2i + 1 and those 8, 16 and 24 after them. GROUP (2, 4 or 8) of these share one running maximum and its tile:
with groups of 8, a distance takes under three instructions. At the end exact differences compare the codes of the best
group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..language.distances import squared_distances
from ..language.products import product
from ..language.rows import (
    Rows,
    codes_of_head,
    head_of_program,
    largest_and_squares,
    load_rows,
    offset_of_head,
    vectors_of_head,
)
from ..language.scaling import (
    bias_shift,
    block_shift,
    codebook_shift,
    first_number_code,
    power_of_two,
    split_terms,
    vector_shift,
)
from .codebook_terms import FINER_BITS, NEVER, NUM_EXTREMES
from .quantize_rows import quantize_rows
from .rescan import error_bound

NO_CODE = tl.constexpr(2147483647)


@triton.jit
def _packed_vectors(x, n, shift, extremes_ptr, BLOCK_D: tl.constexpr):
    """The columns [high, low, high, 1, 1, 1] of vectors n, each 1 in the unit of its bias term (section 7.4)."""
    num_features = x.num_features
    column = tl.arange(0, BLOCK_D)
    high, low = split_terms(load_rows(x, n, column % num_features).to(tl.float32), power_of_two(shift))
    bias_term = tl.minimum(tl.maximum(column - 3 * num_features, 0), 2)
    exponent = shift + codebook_shift(extremes_ptr) - bias_shift(extremes_ptr) - FINER_BITS * bias_term
    ones = power_of_two(exponent).to(tl.float16)
    term = (column // num_features)[None, :]
    return tl.where(term == 1, low, tl.where(term < 3, high, ones[None, :]))


@triton.jit
def _resident_scores(high_terms, low_terms, tile, high, low, score, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """score + x . c of one tile, for vectors whose terms are on the chip; `low` is None with one term."""
    c_high = high_terms.load([tile * BLOCK_K, 0])
    score = product(high, c_high.T, score, PRECISION)
    if low is not None:
        c_low = low_terms.load([tile * BLOCK_K, 0])
        score = product(low, c_high.T, score, PRECISION)
        score = product(high, c_low.T, score, PRECISION)
    return score


@triton.jit
def _chunked_scores(
    x,
    n,
    high_terms,
    low_terms,
    tile,
    scale,
    score,
    TWO_TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """score + x . c of one tile, for vectors that are loaded anew, BLOCK_D features at a time."""
    for begin in tl.range(0, x.num_features, BLOCK_D, num_stages=STAGES):
        high = load_rows(x, n, begin + tl.arange(0, BLOCK_D))
        c_high = high_terms.load([tile * BLOCK_K, begin])
        if TWO_TERMS:
            high, low = split_terms(high.to(tl.float32), scale)
            c_low = low_terms.load([tile * BLOCK_K, begin])
            score = product(low, c_high.T, score, PRECISION)
            score = product(high, c_low.T, score, PRECISION)
        score = product(high, c_high.T, score, PRECISION)
    return score


@triton.jit
def _first_codes(best, winner, tile_of_best, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """The first code of the group of each lane that has the best score, else NO_CODE: [BLOCK_N, lanes]."""
    lane = tl.arange(0, BLOCK_K // GROUP)
    first = tile_of_best * BLOCK_K + ((lane // 4) * (4 * GROUP) + (lane % 4) * 2)[None, :]
    return tl.where((best == winner[:, None]) & (best > NEVER), first, NO_CODE)


@triton.jit
def _runner_up(best, second, first_codes):
    """The runner-up: `second` of the lane that wins, or the best of another lane."""
    first = tl.min(first_codes, axis=1)
    return tl.max(tl.where(first_codes == first[:, None], second, best), axis=1)


@triton.jit
def _compare_exactly(
    x,
    codes,
    bias_ptr,
    n,
    first_codes,
    shift,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    COMPARE_D: tl.constexpr,
):
    """The nearest code, and its distance, by differences times 2^shift, among the groups that have the best score.

    Only groups in the first tile with that score are compared: of tiles that tie in float32 the lowest wins.
    """
    member = tl.arange(0, GROUP)
    member = ((member // 2) * 8 + member % 2)[None, :]
    first = tl.min(first_codes, axis=1)
    distance = tl.full(first.shape, float("inf"), tl.float32)
    index = tl.full(first.shape, NO_CODE, tl.int32)
    first_tile = first // BLOCK_K
    pending = first < NO_CODE
    # Groups of the same tile that tie are compared one after another: a later group may hold an earlier code.
    while tl.max(pending.to(tl.int32), axis=0) > 0:
        k = tl.where(pending[:, None], first[:, None] + member, codes.num_codes)
        is_code = tl.load(bias_ptr + k, mask=k < codes.num_codes, other=NEVER) > NEVER
        squared = squared_distances(x, codes, n, k, power_of_two(shift)[:, None, None], COMPARE_D)
        squared = tl.where(is_code & (squared == squared), squared, float("inf"))
        least = tl.min(squared, axis=1)
        code = tl.min(tl.where(is_code & (squared == least[:, None]), k, NO_CODE), axis=1)
        is_nearer = (least < distance) | ((least == distance) & (code < index))
        distance = tl.where(is_nearer, least, distance)
        index = tl.where(is_nearer, code, index)
        first = tl.min(tl.where(first_codes > first[:, None], first_codes, NO_CODE), axis=1)
        pending = (first < NO_CODE) & (first // BLOCK_K == first_tile)
    return index, distance


@triton.jit
def _assign_non_finite(
    x, codes, extremes_ptr, n, index, distance, is_lost, PADDED: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Indices and distances where no distance is finite: code 0 for a vector with NaN, else the first without NaN."""
    if tl.max(is_lost.to(tl.int32), axis=0) > 0:
        has_nan = tl.zeros([n.shape[0]], tl.int32)
        for begin in range(0, PADDED, BLOCK_D):
            y = load_rows(x, n, begin + tl.arange(0, BLOCK_D))
            has_nan = tl.maximum(has_nan, tl.max((y != y).to(tl.int32), axis=1))
        first = first_number_code(extremes_ptr)
        fallback = tl.where((has_nan > 0) | (first >= codes.num_codes), 0, first)
        distance = tl.where(is_lost & (has_nan > 0), float("nan"), distance)
        index = tl.where(is_lost, fallback, index)
    return index, distance


@triton.jit
def _store_found(found, n, num_vectors, index, distance):
    """Write the index and the distance of vectors n for this partition."""
    at = tl.program_id(1).to(tl.int64) * num_vectors + n
    tl.store(found.indices + at, index.to(found.indices.dtype.element_ty), mask=n < num_vectors)
    tl.store(found.distances + at, distance, mask=n < num_vectors)


@triton.jit
def _store_certificate(found, n, num_vectors, winner, runner_up, bound):
    """Write both scores of vectors n for this partition, and the error bound of their difference."""
    at = tl.program_id(1).to(tl.int64) * num_vectors + n
    tl.store(found.scores + at, winner, mask=n < num_vectors)
    tl.store(found.seconds + at, runner_up, mask=n < num_vectors)
    tl.store(found.bounds + n, bound, mask=n < num_vectors)


@triton.jit
def search_block(
    x,
    codes,
    high_terms,
    low_terms,
    bias_ptr,
    extremes_ptr,
    n,
    first_tile,
    begin,
    end,
    distance_weight,
    CERTIFY: tl.constexpr,
    PADDED: tl.constexpr,
    TWO_TERMS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    COMPARE_D: tl.constexpr,
    TILE_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The nearest codes of vectors n [BLOCK_N] among tiles [begin, end) of one codebook.

    Args:
        codes, bias_ptr, extremes_ptr: those of this codebook.
        first_tile: the number of its first tile among the terms of all codebooks.
    Returns:
        The indices; the squared distances times `distance_weight`; with CERTIFY the best score, the runner-up and the
        error bound of their difference, else the best score in place of these two.
    """
    # Squared differences of float16 cannot overflow float32 with the scale 2^40 or less: their magnitude is not needed.
    MEASURES: tl.constexpr = TWO_TERMS or CERTIFY or x.tensor.dtype.element_ty != tl.float16
    LANES: tl.constexpr = BLOCK_K // GROUP

    # Scale the vectors and keep their terms on the chip if they fit.
    scale = 1.0
    difference_shift = tl.full([BLOCK_N], 40, tl.int32)
    if MEASURES:
        largest, squares = largest_and_squares(x, n, PADDED, BLOCK_D)
        difference_shift = vector_shift(largest)
    if TWO_TERMS:
        shift = block_shift(largest, extremes_ptr, PACKED)
        scale = power_of_two(shift)
    low = None
    if PACKED:
        high = _packed_vectors(x, n, shift, extremes_ptr, BLOCK_D)
    elif BLOCK_D == PADDED:
        high = load_rows(x, n, tl.arange(0, BLOCK_D))
        if TWO_TERMS:
            high, low = split_terms(high.to(tl.float32), scale)

    # Stream the tiles. One of two loops is pipelined: this one if the vectors are on the chip, else that over features.
    best = tl.full([BLOCK_N, LANES], NEVER, tl.float32)
    tile_of_best = tl.zeros([BLOCK_N, LANES], tl.int32)
    if CERTIFY:
        second = tl.full([BLOCK_N, LANES], NEVER, tl.float32)
    for tile in tl.range(begin, end, num_stages=TILE_STAGES):
        score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if BLOCK_D == PADDED:
            score = _resident_scores(high_terms, low_terms, first_tile + tile, high, low, score, PRECISION, BLOCK_K)
        else:
            score = _chunked_scores(
                x,
                n,
                high_terms,
                low_terms,
                first_tile + tile,
                scale,
                score,
                TWO_TERMS,
                PRECISION,
                BLOCK_K,
                BLOCK_D,
                STAGES,
            )
        if not PACKED:
            score += (tl.load(bias_ptr + tile * BLOCK_K + tl.arange(0, BLOCK_K)) * scale)[None, :]
        groups = tl.reshape(score, [BLOCK_N, BLOCK_K // (4 * GROUP), GROUP // 2, 4, 2])
        most = tl.reshape(tl.max(tl.max(groups, axis=4), axis=2), [BLOCK_N, LANES])
        # The comparison is false for NaN, which never wins. Of equal scores in a lane the earlier tile stays.
        is_better = most > best
        if CERTIFY:
            second = tl.where(is_better, best, tl.maximum(most, second))
        best = tl.where(is_better, most, best)
        tile_of_best = tl.where(is_better, tile, tile_of_best)

    # Compare the codes of the best groups by exact differences.
    winner = tl.max(best, axis=1)
    first_codes = _first_codes(best, winner, tile_of_best, BLOCK_K, GROUP)
    runner_up, bound = winner, winner
    if CERTIFY:
        runner_up = _runner_up(best, second, first_codes)
        bound = error_bound(largest, squares, scale, extremes_ptr, x.num_features, TWO_TERMS)
    difference_shift = tl.minimum(difference_shift, codebook_shift(extremes_ptr))
    index, distance = _compare_exactly(x, codes, bias_ptr, n, first_codes, difference_shift, BLOCK_K, GROUP, COMPARE_D)
    is_lost = distance == float("inf")
    unit = power_of_two(-difference_shift)
    distance = distance * distance_weight * unit * unit
    index, distance = _assign_non_finite(x, codes, extremes_ptr, n, index, distance, is_lost, PADDED, BLOCK_D)
    return index, distance, winner, runner_up, bound


@triton.jit
def _search_kernel(
    x,
    codes,
    high_terms,
    low_terms,
    bias_ptr,
    extremes_ptr,
    found,
    quantized,
    half_error_ptr,
    count_ptr,
    num_tiles,
    tiles_each,
    distance_weight,
    PADDED: tl.constexpr,
    TWO_TERMS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    COMPARE_D: tl.constexpr,
    TILE_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Assign a block of vectors to the nearest codes of one partition of `tiles_each` tiles.

    found: a `Found`, [partitions, N]; `seconds` is None without a certificate.
    quantized, half_error_ptr, count_ptr: the fields of a `Quantized`, which this kernel writes, or None.
    """
    CERTIFY: tl.constexpr = found.seconds is not None
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # From here on vectors, codes and tiles are those of one head; `place` is that of a vector among all heads.
    head = head_of_program(codes)
    place, num_places = vectors_of_head(codes, head, n), x.num_vectors
    if codes.num_heads is not None:
        x = Rows(x.tensor + offset_of_head(x, head), x.num_vectors // x.num_heads, *x[2:8])
    codes = codes_of_head(codes, head)
    first_tile = head * num_tiles
    begin = tl.program_id(1) * tiles_each
    index, distance, winner, runner_up, bound = search_block(
        x,
        codes,
        high_terms,
        low_terms,
        bias_ptr + first_tile * BLOCK_K,
        extremes_ptr + head * NUM_EXTREMES,
        n,
        first_tile,
        begin,
        tl.minimum(begin + tiles_each, num_tiles),
        distance_weight,
        CERTIFY,
        PADDED,
        TWO_TERMS,
        PACKED,
        PRECISION,
        BLOCK_N,
        BLOCK_K,
        BLOCK_D,
        GROUP,
        COMPARE_D,
        TILE_STAGES,
        STAGES,
    )
    _store_found(found, place, num_places, index, distance)
    if CERTIFY:
        _store_certificate(found, place, num_places, winner, runner_up, bound)
    if count_ptr is not None:
        quantize_rows(x, codes, quantized, half_error_ptr, count_ptr, head, n, index, False, 16)

"""The last step of `topk_codes`: the selected codes of each vector by (distance, index), or by (-value, index)."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..architectures import INTERPRETED
from ..language.distances import squared_distances
from ..language.rows import Codes, Rows, load_code_groups, load_rows, row_offsets
from ..language.scaling import codebook_shift, power_of_two, vector_shift
from .ordered import NO_KEY, index_of, sort_keys, to_key, value_of

# A key holds the kind of a value beside the index. Values that are not finite sort after all finite ones, as _LAST.
_LAST = tl.constexpr(3.4028234663852886e38)
_FINITE, _INF, _MINUS_INF, _NAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_PROGRAMS = 1024
# Pairs (vector, code) of one program, and elements (pairs x features) that it loads at once.
_PAIRS, _ELEMENTS = (2**13, 2**17) if INTERPRETED else (256, 2**13)


class Inputs(NamedTuple):
    """The inputs of `topk_codes` on the host. dot: whether the metric is x . c + bias, or else the squared distance."""

    x: Rows
    codes: Codes
    bias: Tensor | None
    dot: bool


@triton.jit
def _sort_kernel(
    x,
    codes,
    square_ptr,
    index_ptr,
    value_ptr,
    num_selected,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sort indices and values [N, k] in place; a distance that lost digits by cancellation is computed again.

    square_ptr: [N] |x|^2, or None for inner products.
    """
    DOT: tl.constexpr = square_ptr is None
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    mask = (n < x.num_vectors)[:, None] & (columns < num_selected)[None, :]
    at = n.to(tl.int64)[:, None] * num_selected + columns[None, :]
    index = tl.load(index_ptr + at, mask=mask, other=0).to(tl.int32)
    value = tl.load(value_ptr + at, mask=mask, other=0.0)
    if DOT:
        value = -value
    else:
        squares = tl.load(square_ptr + n, mask=n < x.num_vectors, other=0.0)
        # Below |x|^2 / 64, the expanded distance has lost six bits by cancellation (docs/numerics.md, section 8.3).
        cancels = (value < squares[:, None] * 0.015625) & mask
        if tl.max(cancels.to(tl.int32)) > 0:
            k = tl.where(cancels, index, codes.num_codes)
            value = tl.where(cancels, squared_distances(x, codes, n, k, 1.0, BLOCK_D), value)
    keys = sort_keys(tl.where(mask, to_key(value, index), NO_KEY), False)
    value = value_of(keys)
    tl.store(index_ptr + at, index_of(keys), mask=mask)
    tl.store(value_ptr + at, 0.0 - value if DOT else value, mask=mask)


@triton.jit
def _candidates(
    candidate_ptr, worklist_ptr, count_ptr, places, first, num_vectors, num_codes, num_selected, CAPACITY: tl.constexpr
):
    """The vectors at these places, their first CAPACITY candidates, and the numbers of their candidates [BLOCK_N, 1].

    All codes are candidates of a vector of the worklist, and of one whose list overflowed or is too short.
    """
    columns = tl.arange(0, CAPACITY)[None, :]
    mask = places < num_vectors
    if worklist_ptr is not None:
        n = tl.load(worklist_ptr + places, mask=mask, other=0).to(tl.int64)
        k = tl.zeros([places.shape[0], 1], tl.int32) + columns
        total = tl.where(mask, num_codes, 0)[:, None]
    else:
        n = first + places.to(tl.int64)
        count = tl.load(count_ptr + places, mask=mask, other=0)[:, None]
        is_listed = (count >= num_selected) & (count <= CAPACITY)
        at = candidate_ptr + places.to(tl.int64)[:, None] * CAPACITY + columns
        k = tl.load(at, mask=is_listed & (columns < count), other=0)
        k = tl.where(is_listed, k, columns)
        total = tl.where(is_listed, count, tl.where(mask[:, None], num_codes, 0))
    return tl.where(mask, n, 0), k, total


@triton.jit
def _difference_shift(x, n, extremes_ptr, BLOCK_D: tl.constexpr):
    """The exponent of a scale that keeps squared differences of vectors n in the range of float32."""
    largest = tl.zeros([n.shape[0]], tl.float32)
    for begin in range(0, x.num_features, BLOCK_D):
        y = load_rows(x, n, begin + tl.arange(0, BLOCK_D)).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(y), axis=1))
    return tl.minimum(codebook_shift(extremes_ptr), vector_shift(largest))


@triton.jit
def _keys(x, codes, bias_ptr, n, k, is_candidate, scale, DOT: tl.constexpr, BLOCK_D: tl.constexpr):
    """The keys of codes k [BLOCK_N, C] for vectors n: of scaled squared distances or negative values."""
    starts = row_offsets(x, n)
    total = tl.zeros(k.shape, tl.float32)
    is_nan_code = tl.zeros(k.shape, tl.int32)
    has_nan = tl.zeros(n.shape, tl.int32)
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        at = x.tensor + starts[:, None] + d.to(tl.int64)[None, :] * x.stride_d
        y = tl.load(at, mask=(d < x.num_features)[None, :], other=0.0).to(tl.float32)
        c = load_code_groups(codes, k, is_candidate, d).to(tl.float32)
        has_nan = tl.maximum(has_nan, tl.max((y != y).to(tl.int32), axis=1))
        is_nan_code = tl.maximum(is_nan_code, tl.max((c != c).to(tl.int32), axis=2))
        if DOT:
            total -= tl.sum(y[:, None, :] * c, axis=2)
        else:
            difference = (y[:, None, :] - c) * scale
            total += tl.sum(difference * difference, axis=2)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, mask=is_candidate, other=0.0).to(tl.float32)
        is_nan_code = tl.maximum(is_nan_code, (bias != bias).to(tl.int32))
        total -= bias
    infinite = tl.where(total > 0, _INF, _MINUS_INF)
    kind = tl.where(tl.abs(total) < float("inf"), _FINITE, tl.where(total == total, infinite, _NAN))
    value = tl.where(kind == _FINITE, total, _LAST)
    value = tl.where(is_nan_code > 0, float("inf"), value)
    value = tl.where(has_nan[:, None] > 0, 0.0, value)
    return tl.where(is_candidate, to_key(value, k.to(tl.int64) * 4 + kind), NO_KEY)


@triton.jit
def _decode_keys(keys):
    """The indices and the values, also those that are not finite, of keys."""
    kind = (index_of(keys) % 4).to(tl.int32)
    value = value_of(keys)
    value = tl.where(kind == _FINITE, value, tl.where(kind == _INF, float("inf"), -float("inf")))
    return index_of(keys) // 4, tl.where(kind == _NAN, float("nan"), value)


@triton.jit
def _rank_kernel(
    x,
    codes,
    bias_ptr,
    extremes_ptr,
    candidate_ptr,
    worklist_ptr,
    count_ptr,
    index_ptr,
    value_ptr,
    first,
    num_vectors,
    num_selected,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the best candidates of each vector, or of each vector of a worklist, in order: see `_candidates`."""
    columns = tl.arange(0, CAPACITY)[None, :]
    if worklist_ptr is not None:
        num_vectors = tl.load(count_ptr)
    for start in range(tl.program_id(0) * BLOCK_N, num_vectors, tl.num_programs(0) * BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        sizes = num_vectors, codes.num_codes, num_selected
        n, k, total = _candidates(candidate_ptr, worklist_ptr, count_ptr, places, first, *sizes, CAPACITY)
        shift = tl.zeros([BLOCK_N], tl.int32)
        if not DOT:
            shift = _difference_shift(x, n, extremes_ptr, BLOCK_D)
        scale = power_of_two(shift)[:, None, None]
        best = sort_keys(_keys(x, codes, bias_ptr, n, k, columns < total, scale, DOT, BLOCK_D), False)
        # The loop runs only if all codes of a vector are candidates.
        for begin in range(CAPACITY, tl.max(total), CAPACITY):
            k = tl.zeros([BLOCK_N, 1], tl.int32) + begin + columns
            more = sort_keys(_keys(x, codes, bias_ptr, n, k, k < total, scale, DOT, BLOCK_D), True)
            # The elementwise minima of an ascending and a descending sequence are the least elements of both.
            best = sort_keys(tl.minimum(best, more), False)
        index, value = _decode_keys(best)
        unit = power_of_two(-shift)[:, None]
        value = 0.0 - value if DOT else value * unit * unit
        at = n[:, None] * num_selected + columns
        mask = (places < num_vectors)[:, None] & (columns < num_selected)
        tl.store(index_ptr + at, index, mask=mask)
        tl.store(value_ptr + at, value, mask=mask)


def sort_selected(inputs: Inputs, squares: Tensor | None, indices: Tensor, values: Tensor) -> None:
    """Sort indices and values [N, k] in place, the best first.

    Args:
        squares: [N] |x|^2, or None for inner products.
    """
    num_selected = indices.shape[-1]
    block_k = triton.next_power_of_2(num_selected)
    block_n = max(1, 4 * _PAIRS // block_k)
    _sort_kernel[(triton.cdiv(inputs.x.num_vectors, block_n),)](
        inputs.x, inputs.codes, squares, indices, values, num_selected, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=4
    )


def rank(
    inputs: Inputs,
    extremes: Tensor,
    indices: Tensor,
    values: Tensor,
    count: Tensor,
    *,
    first: int = 0,
    candidates: Tensor | None = None,
    worklist: Tensor | None = None,
) -> None:
    """Write the k best codes of some vectors by exact differences or products. One of the last two is given.

    Args:
        extremes: those of the codebook's terms.
        count: [n], the number of candidates of each vector; or [1], the length of the worklist.
        first: the first of the n vectors that have candidates.
        candidates: [n, capacity] int32 codes.
        worklist: [n] int32 vectors, of which all codes are candidates.
    """
    num_selected = indices.shape[-1]
    if candidates is not None:
        num_vectors, capacity = candidates.shape
    else:
        num_vectors, capacity = inputs.x.num_vectors, max(64, triton.next_power_of_2(num_selected))
    block_n = max(1, _PAIRS // capacity)
    programs = triton.cdiv(num_vectors, block_n)
    if worklist is not None:
        programs = min(programs, _PROGRAMS)
    _rank_kernel[(programs,)](
        inputs.x,
        inputs.codes,
        inputs.bias,
        extremes,
        candidates,
        worklist,
        count,
        indices,
        values,
        first,
        num_vectors,
        num_selected,
        DOT=inputs.dot,
        BLOCK_N=block_n,
        CAPACITY=capacity,
        BLOCK_D=max(8, _ELEMENTS // (block_n * capacity)),
        num_warps=4 if capacity <= 256 else 8,
        maxnreg=255,
    )

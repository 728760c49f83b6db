"""The last step of `topk_codes`: the codes of each row by (distance, index), or by (-value, index)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .codebook_parts import codebook_shift, own_shift, power_of_two
from .distances import squared_distances
from .ordered import NO_KEY, index_of, sort_keys, to_key, value_of
from .rows import Rows, as_rows, code_offsets, load_rows, row_offsets
from .tuning import INTERPRETED

# The order of what is not finite: after all that is, and then NaN codes.
_LAST = tl.constexpr(3.4028234663852886e38)
_FINITE, _INF, _MINUS_INF, _NAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_PROGRAMS = 1024
# Pairs of a row and a code, and features of them, that a program looks at together.
_PAIRS, _ELEMENTS = (2**13, 2**17) if INTERPRETED else (256, 2**13)


@triton.jit
def _sort_kernel(
    x,
    dictionary,
    square_ptr,
    index_ptr,
    value_ptr,
    kept,
    INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sort what was found, in place; a distance that cancelled in its score is computed anew."""
    DOT: tl.constexpr = square_ptr is None
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    mask = (n < x.num_rows)[:, None] & (columns < kept)[None, :]
    at = n.to(tl.int64)[:, None] * kept + columns[None, :]
    codes = tl.load(index_ptr + at, mask=mask, other=0).to(tl.int32)
    value = tl.load(value_ptr + at, mask=mask, other=0.0)
    if DOT:
        value = -value
    else:
        squares = tl.load(square_ptr + n, mask=n < x.num_rows, other=0.0)
        cancels = (value < squares[:, None] * 0.015625) & mask
        if tl.max(cancels.to(tl.int32)) > 0:
            index = tl.where(cancels, codes, dictionary.num_rows)
            value = tl.where(cancels, squared_distances(x, dictionary, n, index, 1.0, BLOCK_D), value)
    keys = sort_keys(tl.where(mask, to_key(value, codes), NO_KEY), False, INTERPRETED)
    value = value_of(keys)
    tl.store(index_ptr + at, index_of(keys), mask=mask)
    tl.store(value_ptr + at, 0.0 - value if DOT else value, mask=mask)


@triton.jit
def _keys(x, dictionary, bias_ptr, starts, codes, is_there, scale, DOT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys of codes [R, C] for the rows that start at `starts` [R]; those of what is not finite say what it is."""
    total = tl.zeros(codes.shape, tl.float32)
    is_nan_code = tl.zeros(codes.shape, tl.int32)
    has_nan = tl.zeros(starts.shape, tl.int32)
    of_codes = code_offsets(dictionary, codes)
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        inside = d < x.num_features
        d = d.to(tl.int64)
        row = tl.load(x.tensor + starts[:, None] + d[None, :] * x.stride_d, mask=inside[None, :], other=0.0).to(
            tl.float32
        )
        c = tl.load(
            dictionary.tensor + of_codes[:, :, None] + d[None, None, :] * dictionary.stride_d,
            mask=is_there[:, :, None] & inside[None, None, :],
            other=0.0,
        ).to(tl.float32)
        has_nan = tl.maximum(has_nan, tl.max((row != row).to(tl.int32), axis=1))
        is_nan_code = tl.maximum(is_nan_code, tl.max((c != c).to(tl.int32), axis=2))
        if DOT:
            total -= tl.sum(row[:, None, :] * c, axis=2)
        else:
            difference = (row[:, None, :] - c) * scale
            total += tl.sum(difference * difference, axis=2)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + codes, mask=is_there, other=0.0).to(tl.float32)
        is_nan_code = tl.maximum(is_nan_code, (bias != bias).to(tl.int32))
        total -= bias
    kind = tl.where(
        tl.abs(total) < float("inf"), _FINITE, tl.where(total == total, tl.where(total > 0, _INF, _MINUS_INF), _NAN)
    )
    value = tl.where(kind == _FINITE, total, _LAST)
    value = tl.where(is_nan_code > 0, float("inf"), value)
    value = tl.where(has_nan[:, None] > 0, 0.0, value)
    return tl.where(is_there, to_key(value, codes.to(tl.int64) * 4 + kind), NO_KEY)


@triton.jit
def _rank_kernel(
    x,
    dictionary,
    bias_ptr,
    meta_ptr,
    candidate_ptr,
    worklist_ptr,
    count_ptr,
    index_ptr,
    value_ptr,
    first,
    num_rows,
    kept,
    DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rank the candidates of each row or, for rows of a worklist and those with too many candidates, all codes."""
    columns = tl.arange(0, CAPACITY)[None, :]
    LISTED: tl.constexpr = worklist_ptr is not None
    if LISTED:
        num_rows = tl.load(count_ptr)
    for start in range(tl.program_id(0) * BLOCK_N, num_rows, tl.num_programs(0) * BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        mask = places < num_rows
        if LISTED:
            rows = tl.load(worklist_ptr + places, mask=mask, other=0).to(tl.int64)
            codes = tl.zeros([BLOCK_N, 1], tl.int32) + columns
            total = tl.where(mask, dictionary.num_rows, 0)[:, None]
        else:
            rows = first + places.to(tl.int64)
            found = tl.load(count_ptr + places, mask=mask, other=0)[:, None]
            is_listed = (found >= kept) & (found <= CAPACITY)
            at = candidate_ptr + places.to(tl.int64)[:, None] * CAPACITY + columns
            codes = tl.load(at, mask=is_listed & (columns < found), other=0)
            codes = tl.where(is_listed, codes, columns)
            total = tl.where(is_listed, found, tl.where(mask[:, None], dictionary.num_rows, 0))
        rows = tl.where(mask, rows, 0)
        starts = row_offsets(x, rows)
        shift = tl.zeros([BLOCK_N], tl.int32)
        if not DOT:
            # Differences are scaled so that their squares stay in range.
            largest = tl.zeros([BLOCK_N], tl.float32)
            for begin in range(0, x.num_features, BLOCK_D):
                y = load_rows(x, rows, begin + tl.arange(0, BLOCK_D)).to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(y), axis=1))
            shift = tl.minimum(codebook_shift(meta_ptr), own_shift(largest))
        scale = power_of_two(shift)[:, None, None]
        best = _keys(x, dictionary, bias_ptr, starts, codes, columns < total, scale, DOT, BLOCK_D)
        best = sort_keys(best, False, INTERPRETED)
        # Only where all codes are looked at.
        for begin in range(CAPACITY, tl.max(total), CAPACITY):
            codes = tl.zeros([BLOCK_N, 1], tl.int32) + begin + columns
            more = _keys(x, dictionary, bias_ptr, starts, codes, codes < total, scale, DOT, BLOCK_D)
            # Of an ascending and a descending sequence the lesser ones are the least of both.
            best = sort_keys(tl.minimum(best, sort_keys(more, True, INTERPRETED)), False, INTERPRETED)
        kind = (index_of(best) % 4).to(tl.int32)
        value = value_of(best)
        value = tl.where(kind == _FINITE, value, tl.where(kind == _INF, float("inf"), -float("inf")))
        value = tl.where(kind == _NAN, float("nan"), value)
        unit = power_of_two(-shift)[:, None]
        value = 0.0 - value if DOT else value * unit * unit
        at = rows[:, None] * kept + columns
        mask = mask[:, None] & (columns < kept)
        tl.store(index_ptr + at, index_of(best) // 4, mask=mask)
        tl.store(value_ptr + at, value, mask=mask)


def sort_found(rows: Rows, dictionary: Tensor, metric: str, squares: Tensor, indices: Tensor, values: Tensor) -> None:
    """Sort indices and values [N, k] in place, the best first.

    Args:
        squares: [N], |x|^2 beside squared distances.
    """
    kept = indices.shape[-1]
    block_k = triton.next_power_of_2(kept)
    block_n = max(1, 4 * _PAIRS // block_k)
    _sort_kernel[(triton.cdiv(rows.num_rows, block_n),)](
        rows,
        as_rows(dictionary),
        None if metric == "dot" else squares,
        indices,
        values,
        kept,
        INTERPRETED=INTERPRETED,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_D=4,
    )


def rank(
    rows: Rows,
    dictionary: Tensor,
    metric: str,
    bias: Tensor | None,
    meta: Tensor,
    indices: Tensor,
    values: Tensor,
    count: Tensor,
    *,
    first: int = 0,
    candidates: Tensor | None = None,
    worklist: Tensor | None = None,
) -> None:
    """Write the k best codes of some rows by exact differences or products.

    Args:
        meta: of the codebook's parts.
        count: with candidates [n, capacity] of the rows from `first` on, how many each has, [n]; with a worklist [n]
            of rows, [1], how many there are.
    """
    kept = indices.shape[-1]
    if candidates is not None:
        num_rows, capacity = candidates.shape
    else:
        num_rows, capacity = rows.num_rows, max(64, triton.next_power_of_2(kept))
    block_n = max(1, _PAIRS // capacity)
    programs = triton.cdiv(num_rows, block_n)
    if worklist is not None:
        programs = min(programs, _PROGRAMS)
    _rank_kernel[(programs,)](
        rows,
        as_rows(dictionary),
        bias,
        meta,
        candidates,
        worklist,
        count,
        indices,
        values,
        first,
        num_rows,
        kept,
        DOT=metric == "dot",
        INTERPRETED=INTERPRETED,
        BLOCK_N=block_n,
        CAPACITY=capacity,
        BLOCK_D=max(8, _ELEMENTS // (block_n * capacity)),
        num_warps=4 if capacity <= 256 else 8,
        maxnreg=255,
    )

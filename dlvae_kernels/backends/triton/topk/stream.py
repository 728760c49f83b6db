"""The k best of many codes: two passes over tiles of codes that list candidates, and never a row of scores.

A score from the high terms alone, one product in place of three, has an error bound. The first pass keeps the largest
lower bound of each group of codes: k codes reach the k-th largest of them. The second pass lists the codes whose upper
bound reaches it; with enough groups these are about 1.2 k. The candidates, or all codes of a vector whose list
overflows, are ranked by exact differences or products (docs/numerics.md, section 8.4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..architectures import partition
from ..language.products import product
from ..language.rows import Rows, largest_and_squares, load_rows
from ..language.scaling import codebook_shift, power_of_two, split_terms, vector_shift
from ..search.codebook_terms import CodebookTerms, codebook_terms
from ..search.rescan import ERROR
from .config import TopkConfig, stream_config
from .ordered import from_ordered, kth_largest, to_ordered
from .rank import Inputs, rank

# The relative error of a product whose factors are rounded to float16: 2^-11 each, and their product.
_ROUNDING = tl.constexpr(2.0**-10 * 1.001)
# The error of a small feature, 2^-25 of a unit, is 2^-11 of this.
_SMALLEST = tl.constexpr(2.0**-14)
# Limits of a chunk: vectors, and lower bounds (vectors x groups). They bound its scratch memory.
_MAX_VECTORS, _MAX_BOUNDS = 2**15, 2**26
_MAX_PARTITIONS = 64
_BLOCK_N = 32


class Vectors(NamedTuple):
    """The vectors of one chunk beside their high terms: the unit of the terms, and a bound of |x|; [n] float32."""

    unit: Tensor
    length: Tensor


class Lists(NamedTuple):
    """The lists that the second pass writes.

    threshold: [n] float32, which the upper bound of a candidate reaches.
    candidates: [n, capacity] int32.
    counts: [n] int32, the numbers of candidates; those that exceed the capacity are not written.
    """

    threshold: Tensor
    candidates: Tensor
    counts: Tensor


@triton.jit
def _row_terms_kernel(
    x,
    term_ptr,
    vectors,
    first,
    num_vectors,
    TWO_TERMS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the high terms of vectors from `first` on, [n, D padded], their units and lengths."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = place < num_vectors
    n = tl.where(mask, first + place, x.num_vectors)
    shift = tl.zeros([BLOCK_N], tl.int32)
    if TWO_TERMS:
        shift = vector_shift(largest_and_squares(x, n, PADDED, BLOCK_D)[0])
    scale = power_of_two(shift)[:, None]
    squares = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, PADDED, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        high = load_rows(x, n, d)
        scaled = high.to(tl.float32) * scale
        squares += tl.sum(scaled * scaled, axis=1)
        if TWO_TERMS:
            high, _ = split_terms(high.to(tl.float32), scale)
        tl.store(term_ptr + place.to(tl.int64)[:, None] * PADDED + d[None, :], high, mask=mask[:, None])
    length = tl.sqrt(squares)
    if TWO_TERMS:
        length += tl.sqrt(tl.cast(x.num_features, tl.float32)) * _SMALLEST
    tl.store(vectors.unit + place, power_of_two(-shift), mask=mask)
    tl.store(vectors.length + place, length * power_of_two(-shift), mask=mask)


@triton.jit
def _append(lists, is_listed, n, first, CAPACITY: tl.constexpr):
    """Append to the lists of vectors n those of the codes `first` and up that is_listed [BLOCK_N, BLOCK_K] marks."""
    BLOCK_K: tl.constexpr = is_listed.shape[1]
    columns = tl.arange(0, BLOCK_K)[None, :]
    total = tl.sum(is_listed.to(tl.int32), axis=1)
    if tl.max(total, axis=0) > 0:
        place = tl.atomic_add(lists.counts + n, total, mask=total > 0, sem="relaxed")
        # A vector has few candidates in a tile: they are written one after another.
        pending = tl.where(is_listed, columns, BLOCK_K)
        column = tl.min(pending, axis=1)
        while tl.min(column, axis=0) < BLOCK_K:
            at = lists.candidates + n.to(tl.int64) * CAPACITY + place
            tl.store(at, first + column, mask=(column < BLOCK_K) & (place < CAPACITY))
            place += 1
            # A full list ends the loop for its vector.
            pending = tl.where((pending > column[:, None]) & (place < CAPACITY)[:, None], pending, BLOCK_K)
            column = tl.min(pending, axis=1)


@triton.jit
def _filter_kernel(
    x_terms,
    code_terms,
    vectors,
    bias_ptr,
    norm_ptr,
    extremes_ptr,
    bound_ptr,
    lists,
    num_vectors,
    num_features,
    num_tiles,
    tiles_each,
    TWO_TERMS: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the largest lower bound of each group of codes, [n, groups], or with `lists` the candidates."""
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    mask = n < num_vectors
    unit = tl.load(vectors.unit + n, mask=mask, other=0.0)[:, None]
    length = tl.load(vectors.length + n, mask=mask, other=0.0)[:, None]
    features = tl.cast(num_features, tl.float32)
    error = ERROR * (1.0 + features / 85.0)
    smallest = 0.0
    product_error = error
    if TWO_TERMS:
        code_unit = power_of_two(-codebook_shift(extremes_ptr))
        unit *= code_unit
        smallest = tl.sqrt(features) * _SMALLEST * code_unit
        product_error += _ROUNDING
    if lists is not None:
        threshold = tl.load(lists.threshold + n, mask=mask, other=float("inf"))[:, None]
    begin = tl.program_id(1) * tiles_each
    for tile in range(begin, tl.minimum(begin + tiles_each, num_tiles)):
        first = tile * BLOCK_K
        score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for d in tl.range(0, PADDED, BLOCK_D, num_stages=STAGES):
            score = product(x_terms.load([start, d]), code_terms.load([first, d]).T, score, "ieee")
        norm = tl.load(norm_ptr + first + tl.arange(0, BLOCK_K))
        is_finite = norm < float("inf")
        bias = tl.where(is_finite, tl.load(bias_ptr + first + tl.arange(0, BLOCK_K)), 0.0)
        code_error = tl.where(is_finite, (norm + smallest) * product_error, 0.0)[None, :]
        bias_error = tl.abs(bias) * error
        if lists is not None:
            upper = score * unit + (length * code_error + (bias + bias_error)[None, :])
            # A code whose |c|^2 overflows is always listed.
            is_listed = (((upper < threshold) == 0) & is_finite[None, :]) | (norm == float("inf"))[None, :]
            # A vector that is not finite has no list.
            is_listed &= mask[:, None] & (length < float("inf"))
            _append(lists, is_listed, n, first, CAPACITY)
        else:
            lower = score * unit + ((bias - bias_error)[None, :] - length * code_error)
            lower = tl.where(is_finite[None, :] & (lower == lower), lower, float("-inf"))
            bound = tl.max(tl.reshape(lower, [BLOCK_N, GROUPS, BLOCK_K // GROUPS]), axis=2)
            at = n.to(tl.int64)[:, None] * (num_tiles * GROUPS) + tile * GROUPS + tl.arange(0, GROUPS)[None, :]
            tl.store(bound_ptr + at, bound, mask=mask[:, None])


@triton.jit
def _threshold_kernel(
    bound_ptr, threshold_ptr, num_vectors, num_groups, num_selected, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Write a threshold that the k largest lower bounds of each vector reach."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = tl.arange(0, BLOCK_G)
    mask = (n < num_vectors)[:, None] & (groups < num_groups)[None, :]
    at = bound_ptr + n.to(tl.int64)[:, None] * num_groups + groups[None, :]
    threshold, _ = kth_largest(to_ordered(tl.load(at, mask=mask, other=float("-inf"))), num_selected)
    tl.store(threshold_ptr + n, from_ordered(threshold), mask=n < num_vectors)


def topk_stream(inputs: Inputs, indices: Tensor, values: Tensor) -> None:
    """Write the k best codes of each vector, [N, k] int64, and their distances or values, [N, k] float32."""
    x, codes = inputs.x, inputs.codes
    dtype = x.tensor.dtype
    num_selected = indices.shape[-1]
    two_terms = codes.tensor.dtype != dtype or dtype == torch.float32
    config = stream_config(x.num_features)
    terms = codebook_terms(
        codes,
        padded=config.padded(x.num_features),
        block_k=config.block_k,
        dtype=torch.float16 if two_terms else dtype,
        two_terms=two_terms,
        scales_bias=False,
        metric="dot" if inputs.dot else "l2",
        bias=inputs.bias,
    )
    tiles = triton.cdiv(codes.num_codes, config.block_k)
    # With 3 k groups, about 1.2 k codes reach the k-th largest of their bounds.
    groups = min(config.block_k // 2, triton.next_power_of_2(triton.cdiv(3 * num_selected, tiles)))
    at_once = max(config.block_n, min(_MAX_VECTORS, _MAX_BOUNDS // (tiles * groups)))
    for first in range(0, x.num_vectors, at_once):
        count = min(at_once, x.num_vectors - first)
        lists = _lists(x, first, count, tiles, groups, num_selected, terms, two_terms, config)
        rank(inputs, terms.extremes, indices, values, lists.counts, first=first, candidates=lists.candidates)


def _lists(
    x: Rows,
    first: int,
    num_vectors: int,
    tiles: int,
    groups: int,
    num_selected: int,
    terms: CodebookTerms,
    two_terms: bool,
    config: TopkConfig,
) -> Lists:
    """The lists of n vectors from `first` on."""
    device = x.tensor.device
    padded = config.padded(x.num_features)
    x_terms = torch.empty(num_vectors, padded, dtype=terms.high.dtype, device=device)
    units, lengths, thresholds = torch.empty(3, num_vectors, dtype=torch.float32, device=device)
    vectors = Vectors(units, lengths)
    _row_terms_kernel[(triton.cdiv(num_vectors, _BLOCK_N),)](
        x,
        x_terms,
        vectors,
        first,
        num_vectors,
        TWO_TERMS=two_terms,
        PADDED=padded,
        BLOCK_N=_BLOCK_N,
        BLOCK_D=config.block_d,
    )
    capacity = max(64, triton.next_power_of_2(3 * num_selected))
    bounds = torch.empty(num_vectors, tiles * groups, dtype=torch.float32, device=device)
    counts = torch.zeros(num_vectors, dtype=torch.int32, device=device)
    lists = Lists(thresholds, torch.empty(num_vectors, capacity, dtype=torch.int32, device=device), counts)
    blocks = triton.cdiv(num_vectors, config.block_n)
    partitions, tiles_each = partition(blocks, tiles, max_partitions=_MAX_PARTITIONS)

    def filter_codes(lists: Lists | None) -> None:
        _filter_kernel[(blocks, partitions)](
            TensorDescriptor.from_tensor(x_terms, [config.block_n, config.block_d]),
            TensorDescriptor.from_tensor(terms.high, [config.block_k, config.block_d]),
            vectors,
            terms.bias,
            terms.norms,
            terms.extremes,
            bounds,
            lists,
            num_vectors,
            x.num_features,
            tiles,
            tiles_each,
            TWO_TERMS=two_terms,
            GROUPS=groups,
            CAPACITY=capacity,
            PADDED=padded,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_D=config.block_d,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            maxnreg=255,
        )

    filter_codes(None)
    block_g = triton.next_power_of_2(max(tiles * groups, num_selected))
    block_n = max(1, 2048 // block_g)
    _threshold_kernel[(triton.cdiv(num_vectors, block_n),)](
        bounds, thresholds, num_vectors, tiles * groups, num_selected, BLOCK_N=block_n, BLOCK_G=block_g
    )
    filter_codes(lists)
    return lists

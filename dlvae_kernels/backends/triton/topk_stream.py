"""The k best of many codes: two passes over tiles of codes, and never a row of scores.

A score by float16 parts alone, one product instead of three, is known to within a bound. The first pass keeps of the
lower bounds the largest of each group of codes: the k-th largest of those is a score that k codes reach. The second
lists the codes whose upper bound reaches it, with enough groups about 1.2 k of them. What is listed, and all codes of
a row whose list overflows, is ranked by exact differences or products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .codebook_parts import CodebookParts, codebook_parts, codebook_shift, own_shift, power_of_two, split
from .ordered import from_ordered, kth_largest, to_ordered
from .products import product
from .rescan import ERROR
from .rows import Rows, load_rows
from .topk_rank import rank
from .tuning import INTERPRETED, TopkConfig, filter_config, num_splits

# Of a product, where both factors are rounded to float16 parts: 2^-11 each, and their product.
_ROUNDING = tl.constexpr(2.0**-10 * 1.001)
# What is lost of a small feature beside the largest, 2^-25 of a unit, is 2^-11 of this.
_SMALLEST = tl.constexpr(2.0**-14)
# Rows at a time, and largest bounds of groups for them: lists take little beside them.
_MOST_ROWS, _MOST_BOUNDS = 2**15, 2**26


@triton.jit
def _row_parts_kernel(
    x,
    part_ptr,
    unit_ptr,
    reach_ptr,
    first,
    num_rows,
    SPLIT: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scaled high parts of rows, [N, D padded], the unit of each and its length, by which errors are bounded."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < num_rows
    n = tl.where(mask, first + rows, x.num_rows)
    features = tl.arange(0, BLOCK_D)
    shift = tl.zeros([BLOCK_N], tl.int32)
    if SPLIT:
        largest = tl.zeros([BLOCK_N], tl.float32)
        for d in range(0, PADDED, BLOCK_D):
            y = load_rows(x, n, d + features)
            largest = tl.maximum(largest, tl.max(tl.abs(y.to(tl.float32)), axis=1))
        shift = own_shift(largest)
    scale = power_of_two(shift)[:, None]
    squares = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, PADDED, BLOCK_D):
        y = load_rows(x, n, d + features)
        scaled = y.to(tl.float32) * scale
        squares += tl.sum(scaled * scaled, axis=1)
        high = y
        if SPLIT:
            high, _ = split(y.to(tl.float32), scale)
        out = rows.to(tl.int64)[:, None] * PADDED + d + features[None, :]
        tl.store(part_ptr + out, high, mask=mask[:, None])
    length = tl.sqrt(squares)
    if SPLIT:
        length += tl.sqrt(tl.cast(x.num_features, tl.float32)) * _SMALLEST
    tl.store(unit_ptr + rows, power_of_two(-shift), mask=mask)
    tl.store(reach_ptr + rows, length * power_of_two(-shift), mask=mask)


@triton.jit
def _filter_kernel(
    x_parts,
    unit_ptr,
    reach_ptr,
    code_parts,
    bias_ptr,
    norm_ptr,
    meta_ptr,
    most_ptr,
    threshold_ptr,
    candidate_ptr,
    count_ptr,
    num_rows,
    num_features,
    num_tiles,
    tiles_per_split,
    COLLECT: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Largest lower bound of each group of codes, [N, groups]; or the codes whose upper bound reaches a threshold."""
    start = tl.program_id(0) * BLOCK_N
    rows = start + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    mask = rows < num_rows
    unit = tl.load(unit_ptr + rows, mask=mask, other=0.0)[:, None]
    reach = tl.load(reach_ptr + rows, mask=mask, other=0.0)[:, None]
    features = tl.cast(num_features, tl.float32)
    error = ERROR * (1.0 + features / 85.0)
    smallest = 0.0
    error_of_product = error
    if SPLIT:
        of_parts = power_of_two(-codebook_shift(meta_ptr))
        unit *= of_parts
        smallest = tl.sqrt(features) * _SMALLEST * of_parts
        error_of_product += _ROUNDING
    if COLLECT:
        threshold = tl.load(threshold_ptr + rows, mask=mask, other=float("inf"))[:, None]
    begin = tl.program_id(1) * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, num_tiles)):
        score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for d in tl.range(0, PADDED, BLOCK_D, num_stages=STAGES):
            x = x_parts.load([start, d])
            c = code_parts.load([tile * BLOCK_K, d])
            score = product(x, c.T, score, "ieee", UPCAST)
        norm = tl.load(norm_ptr + tile * BLOCK_K + columns)
        bias = tl.load(bias_ptr + tile * BLOCK_K + columns)
        is_finite = norm < float("inf")
        bias = tl.where(is_finite, bias, 0.0)
        of_code = tl.where(is_finite, (norm + smallest) * error_of_product, 0.0)[None, :]
        of_bias = tl.abs(bias) * error
        if COLLECT:
            upper = score * unit + (reach * of_code + (bias + of_bias)[None, :])
            # A code that is too long for a square may be anywhere; a row that is not finite has no list.
            is_open = norm == float("inf")
            is_listed = (((upper < threshold) == 0) & is_finite[None, :]) | is_open[None, :]
            is_listed &= mask[:, None] & (reach < float("inf"))
            total = tl.sum(is_listed.to(tl.int32), axis=1)
            if tl.max(total, axis=0) > 0:
                place = tl.atomic_add(count_ptr + rows, total, mask=total > 0, sem="relaxed")
                # A row has few in a tile: one after the other.
                pending = tl.where(is_listed, columns[None, :], BLOCK_K)
                column = tl.min(pending, axis=1)
                while tl.min(column, axis=0) < BLOCK_K:
                    out = candidate_ptr + rows.to(tl.int64) * CAPACITY + place
                    tl.store(out, tile * BLOCK_K + column, mask=(column < BLOCK_K) & (place < CAPACITY))
                    place += 1
                    # What has no room left is not looked at.
                    pending = tl.where((pending > column[:, None]) & (place < CAPACITY)[:, None], pending, BLOCK_K)
                    column = tl.min(pending, axis=1)
        else:
            lower = score * unit + ((bias - of_bias)[None, :] - reach * of_code)
            lower = tl.where(is_finite[None, :] & (lower == lower), lower, float("-inf"))
            most = tl.max(tl.reshape(lower, [BLOCK_N, GROUPS, BLOCK_K // GROUPS]), axis=2)
            out = rows.to(tl.int64)[:, None] * (num_tiles * GROUPS) + tile * GROUPS + tl.arange(0, GROUPS)[None, :]
            tl.store(most_ptr + out, most, mask=mask[:, None])


@triton.jit
def _threshold_kernel(
    most_ptr, threshold_ptr, num_rows, num_groups, kept, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr
):
    """The k-th largest of the lower bounds of each row."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = tl.arange(0, BLOCK_G)
    mask = (rows < num_rows)[:, None] & (groups < num_groups)[None, :]
    most = tl.load(most_ptr + rows.to(tl.int64)[:, None] * num_groups + groups[None, :], mask=mask, other=float("-inf"))
    threshold, _ = kth_largest(to_ordered(most), kept)
    tl.store(threshold_ptr + rows, from_ordered(threshold), mask=rows < num_rows)


def topk_stream(
    rows: Rows, dictionary: Tensor, metric: str, bias: Tensor | None, indices: Tensor, values: Tensor
) -> None:
    """Write the k best codes of each row, [N, k] int64, and their distances or values, [N, k] float32."""
    x = rows.tensor
    kept = indices.shape[-1]
    splits_parts = dictionary.dtype != x.dtype or x.dtype == torch.float32
    dtype = torch.float16 if splits_parts else x.dtype
    config = filter_config(rows.num_features)
    parts = codebook_parts(dictionary, config, dtype, splits_parts, metric, bias, scales_bias=False)
    tiles = triton.cdiv(len(dictionary), config.block_k)
    # With 3 k groups about 1.2 k codes reach the k-th largest of their maxima.
    groups = min(config.block_k // 2, triton.next_power_of_2(triton.cdiv(3 * kept, tiles)))
    at_once = max(config.block_n, min(_MOST_ROWS, _MOST_BOUNDS // (tiles * groups)))
    for first in range(0, rows.num_rows, at_once):
        count = min(at_once, rows.num_rows - first)
        candidates, counts = _list(rows, first, count, tiles, groups, kept, parts, splits_parts, config)
        rank(rows, dictionary, metric, bias, parts.meta, indices, values, counts, first=first, candidates=candidates)


def _list(
    rows: Rows,
    first: int,
    num_rows: int,
    tiles: int,
    groups: int,
    kept: int,
    parts: CodebookParts,
    splits_parts: bool,
    config: TopkConfig,
) -> tuple[Tensor, Tensor]:
    """Candidates [n, capacity] int32 of n rows, and how many each has, [n] int32: more than fit are not kept."""
    device = rows.tensor.device
    padded = config.padded(rows.num_features)
    x_parts = torch.empty(num_rows, padded, dtype=parts.high.dtype, device=device)
    units, reaches, thresholds = torch.empty(3, num_rows, dtype=torch.float32, device=device)
    _row_parts_kernel[(triton.cdiv(num_rows, 32),)](
        rows,
        x_parts,
        units,
        reaches,
        first,
        num_rows,
        SPLIT=splits_parts,
        PADDED=padded,
        BLOCK_N=32,
        BLOCK_D=config.block_d,
    )
    capacity = max(64, triton.next_power_of_2(3 * kept))
    most = torch.empty(num_rows, tiles * groups, dtype=torch.float32, device=device)
    counts = torch.zeros(num_rows, dtype=torch.int32, device=device)
    candidates = torch.empty(num_rows, capacity, dtype=torch.int32, device=device)
    splits = num_splits(num_rows, tiles, config)
    per_split = triton.cdiv(tiles, splits)
    grid = (triton.cdiv(num_rows, config.block_n), triton.cdiv(tiles, per_split))
    for collect in (False, True):
        _filter_kernel[grid](
            TensorDescriptor.from_tensor(x_parts, [config.block_n, config.block_d]),
            units,
            reaches,
            TensorDescriptor.from_tensor(parts.high, [config.block_k, config.block_d]),
            parts.bias,
            parts.norms,
            parts.meta,
            most,
            thresholds,
            candidates,
            counts,
            num_rows,
            rows.num_features,
            tiles,
            per_split,
            COLLECT=collect,
            SPLIT=splits_parts,
            UPCAST=INTERPRETED,
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
        if not collect:
            block_g = triton.next_power_of_2(max(tiles * groups, kept))
            block_n = max(1, 2048 // block_g)
            _threshold_kernel[(triton.cdiv(num_rows, block_n),)](
                most, thresholds, num_rows, tiles * groups, kept, BLOCK_N=block_n, BLOCK_G=block_g
            )
    return candidates, counts

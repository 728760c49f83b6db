"""Triton `nearest_code`: tiles of codes stream past a block of rows, and only a running minimum is kept.

score = x . c - |c|^2 / 2, the largest is nearest. A float32 product is three products of float16 parts on the matrix
units (see `codebook_parts`); what the product of both low parts would add lies under float32 rounding. Each lane keeps
its best score over all tiles and the tile that this came from, so that the loop needs four instructions a distance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .codebook_parts import (
    NEVER,
    TARGET_EXPONENT,
    codebook_parts,
    codebook_shift,
    exponent_of,
    power_of_two,
    split,
)
from .rows import Rows, as_rows, load_rows, row_offsets
from .tuning import INTERPRETED, num_splits, on_device, search_config

# Of a score, over |x| |c| + |c|^2 / 2: what float16 parts and float32 accumulation may be off by.
ERROR = tl.constexpr(2.0**-19)
INFINITE = tl.constexpr(3.4028236e38)
_RESCAN_PROGRAMS = 1024


@triton.jit
def _product(x, c, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        return acc + tl.dot(x.to(tl.float32), c.to(tl.float32), input_precision="ieee")
    return tl.dot(x, c, acc=acc, input_precision=PRECISION)


@triton.jit
def _row_shift(largest, meta_ptr):
    """The power of two that scales a block of rows, of which `largest` is the largest finite feature.

    One for the whole block: what rows smaller than its largest lose is nothing beside |c|, as long as no row is 2^19
    times as long as the codes. Of one that is, all distances tie in float32; it is cut off instead.
    """
    of_codes = tl.load(meta_ptr)
    shift = -tl.minimum(exponent_of(largest), of_codes + 19) + TARGET_EXPONENT
    # Not so much that the scaled bias overflows: beside such codes x is nothing.
    return tl.minimum(tl.minimum(shift, 120), 120 - tl.load(meta_ptr + 2) - codebook_shift(meta_ptr))


@triton.jit
def _error_bound(largest, squares, scale, meta_ptr, num_features, SPLIT: tl.constexpr):
    """How much the difference of two scores of a row may be off, in the units of the scores: [BLOCK_N]."""
    # The largest bias b of a code bounds all |c|.
    bias = power_of_two(tl.minimum(tl.load(meta_ptr + 2) + 1, 127))
    code = tl.sqrt(2.0 * bias)
    shift = 1.0
    if SPLIT:
        shift = power_of_two(codebook_shift(meta_ptr))
    bound = ((tl.sqrt(squares) * scale) * (code * shift) + (bias * shift) * scale) * (2.0 * ERROR)
    if SPLIT:
        # The parts of a row, beside the largest of its block, are off by 2^-25 of a unit each; of one that was cut
        # off, nothing is known.
        bound += 2.0**-23 * tl.sqrt(num_features.to(tl.float32)) * (code * shift)
        bound = tl.where(largest * scale < 2.0**15, bound, float("inf"))
    return bound


@triton.jit
def _nearest_code_fwd_kernel(
    x_ptr,
    high_parts,
    low_parts,
    bias_ptr,
    meta_ptr,
    index_ptr,
    score_ptr,
    second_ptr,
    bound_ptr,
    num_rows,
    num_features,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    num_codes,
    num_tiles,
    tiles_per_split,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    CERTIFY: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Best score and index of each row among the codes of one split: [splits, N]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    features = tl.arange(0, BLOCK_D)
    scale = 1.0
    if SPLIT or CERTIFY:
        largest = tl.zeros([BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for d in range(0, PADDED, BLOCK_D):
            x = load_rows(
                x_ptr, rows, d + features, num_rows, num_features, inner, stride_outer, stride_inner, stride_d
            ).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
            squares += tl.sum(x * x, axis=1)
    if SPLIT:
        scale = power_of_two(_row_shift(tl.max(tl.where(largest < INFINITE, largest, 0.0), axis=0), meta_ptr))
    if BLOCK_D == PADDED:
        x = load_rows(x_ptr, rows, features, num_rows, num_features, inner, stride_outer, stride_inner, stride_d)
        if SPLIT:
            x, x_low = split(x.to(tl.float32), scale)
    best = tl.full([BLOCK_K, BLOCK_N], NEVER, tl.float32)
    tile_of_best = tl.zeros([BLOCK_K, BLOCK_N], tl.int32)
    if CERTIFY:
        second = tl.full([BLOCK_K, BLOCK_N], NEVER, tl.float32)
    begin = tl.program_id(1) * tiles_per_split
    # One of the two loops is pipelined: this one where a row is one block of features, else that over its blocks.
    for tile in tl.range(begin, tl.minimum(begin + tiles_per_split, num_tiles), num_stages=TILE_STAGES):
        bias = tl.load(bias_ptr + tile * BLOCK_K + columns) * scale
        score = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
        if BLOCK_D == PADDED:
            high = high_parts.load([tile * BLOCK_K, 0])
            score = _product(high, x.T, score, PRECISION, UPCAST)
            if SPLIT:
                low = low_parts.load([tile * BLOCK_K, 0])
                score = _product(high, x_low.T, score, PRECISION, UPCAST)
                score = _product(low, x.T, score, PRECISION, UPCAST)
        else:
            for block in tl.range(0, PADDED, BLOCK_D, num_stages=STAGES):
                at = block + features
                y = load_rows(x_ptr, rows, at, num_rows, num_features, inner, stride_outer, stride_inner, stride_d)
                high = high_parts.load([tile * BLOCK_K, block])
                if SPLIT:
                    y, y_low = split(y.to(tl.float32), scale)
                    low = low_parts.load([tile * BLOCK_K, block])
                    score = _product(high, y_low.T, score, PRECISION, UPCAST)
                    score = _product(low, y.T, score, PRECISION, UPCAST)
                score = _product(high, y.T, score, PRECISION, UPCAST)
        score += bias[:, None]
        # False for NaN: it never wins. Of equal scores in a lane the earlier tile stays.
        is_better = score > best
        if CERTIFY:
            second = tl.where(is_better, best, tl.maximum(score, second))
        best = tl.where(is_better, score, best)
        tile_of_best = tl.where(is_better, tile, tile_of_best)
    winner = tl.max(best, axis=0)
    candidates = tl.where(best == winner[None, :], tile_of_best * BLOCK_K + columns[:, None], 2147483647)
    index = tl.min(candidates, axis=0)
    is_lost = winner <= NEVER
    if tl.max(is_lost.to(tl.int32), axis=0) > 0:
        # Nothing can be compared: a row that holds NaN takes 0, another one the first code that is not NaN.
        has_nan = tl.zeros([BLOCK_N], tl.int32)
        for d in range(0, PADDED, BLOCK_D):
            y = load_rows(
                x_ptr, rows, d + features, num_rows, num_features, inner, stride_outer, stride_inner, stride_d
            )
            has_nan = tl.maximum(has_nan, tl.max((y != y).to(tl.int32), axis=1))
        first = tl.load(meta_ptr + 1)
        index = tl.where(is_lost, tl.where((has_nan > 0) | (first >= num_codes), 0, first), index)
    mask = rows < num_rows
    out = tl.program_id(1).to(tl.int64) * num_rows + rows
    tl.store(index_ptr + out, index.to(index_ptr.dtype.element_ty), mask=mask)
    tl.store(score_ptr + out, winner, mask=mask)
    if CERTIFY:
        # Of a tie within one lane the other score is in `second`; of one between lanes, in `best`.
        others = tl.where(candidates == index[None, :], second, best)
        tl.store(second_ptr + out, tl.max(others, axis=0), mask=mask)
        tl.store(bound_ptr + rows, _error_bound(largest, squares, scale, meta_ptr, num_features, SPLIT), mask=mask)


@triton.jit
def _join_splits_kernel(
    part_index_ptr,
    score_ptr,
    second_ptr,
    bound_ptr,
    index_ptr,
    worklist_ptr,
    count_ptr,
    num_rows,
    splits,
    CERTIFY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The best of all splits, the earliest of equal ones; rows with two scores too close go on the worklist."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < num_rows
    best = tl.load(score_ptr + rows, mask=mask, other=0.0)
    index = tl.load(part_index_ptr + rows, mask=mask, other=0)
    if CERTIFY:
        second = tl.load(second_ptr + rows, mask=mask, other=0.0)
    for part in range(1, splits):
        at = tl.cast(part, tl.int64) * num_rows + rows
        score = tl.load(score_ptr + at, mask=mask, other=0.0)
        is_better = score > best
        if CERTIFY:
            other = tl.load(second_ptr + at, mask=mask, other=0.0)
            second = tl.maximum(tl.where(is_better, best, score), tl.where(is_better, other, second))
        index = tl.where(is_better, tl.load(part_index_ptr + at, mask=mask, other=0), index)
        best = tl.where(is_better, score, best)
    tl.store(index_ptr + rows, index.to(tl.int64), mask=mask)
    if CERTIFY:
        # Also where the difference is not a number.
        is_close = ((best - second > tl.load(bound_ptr + rows, mask=mask, other=0.0)) == 0) & mask
        places = tl.atomic_add(count_ptr + tl.zeros_like(rows), 1, mask=is_close)
        tl.store(worklist_ptr + places, rows, mask=is_close)


@triton.jit
def _rescan_kernel(
    x_ptr,
    codes_ptr,
    index_ptr,
    worklist_ptr,
    count_ptr,
    num_rows,
    num_features,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    num_codes,
    stride_ck,
    stride_cd,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of the worklist anew, by differences in float32; each program takes every P-th of them."""
    count = tl.load(count_ptr)
    columns = tl.arange(0, BLOCK_K)
    for place in range(tl.program_id(0), count, tl.num_programs(0)):
        row = tl.load(worklist_ptr + place)
        start = row_offsets(row, inner, stride_outer, stride_inner)
        best = tl.full([], float("inf"), tl.float32)
        index = tl.load(index_ptr + row).to(tl.int32)
        for begin in range(0, num_codes, BLOCK_K):
            codes = begin + columns
            distance = tl.zeros([BLOCK_K], tl.float32)
            for d in range(0, num_features, BLOCK_D):
                features = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
                x = tl.load(x_ptr + start + features * stride_d, mask=features < num_features, other=0.0)
                offsets = codes.to(tl.int64)[:, None] * stride_ck + features[None, :] * stride_cd
                inside = (codes < num_codes)[:, None] & (features < num_features)[None, :]
                c = tl.load(codes_ptr + offsets, mask=inside, other=0.0)
                difference = x.to(tl.float32)[None, :] - c.to(tl.float32)
                distance += tl.sum(difference * difference, axis=1)
            distance = tl.where((codes < num_codes) & (distance == distance), distance, float("inf"))
            smallest = tl.min(distance, axis=0)
            if smallest < best:
                best = smallest
                index = tl.min(tl.where(distance == smallest, codes, 2147483647), axis=0)
        tl.store(index_ptr + row, index.to(tl.int64))


@triton.jit
def _distance_kernel(
    x_ptr,
    codes_ptr,
    index_ptr,
    distance_ptr,
    num_rows,
    num_features,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    stride_ck,
    stride_cd,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Squared distances of rows to their codes, by differences."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < num_rows
    index = tl.load(index_ptr + rows, mask=mask, other=0)
    total = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x = load_rows(x_ptr, rows, d, num_rows, num_features, inner, stride_outer, stride_inner, stride_d)
        offsets = index[:, None] * stride_ck + d.to(tl.int64)[None, :] * stride_cd
        c = tl.load(codes_ptr + offsets, mask=mask[:, None] & (d < num_features)[None, :], other=0.0)
        difference = x.to(tl.float32) - c.to(tl.float32)
        total += tl.sum(difference * difference, axis=1)
    tl.store(distance_ptr + rows, total, mask=mask)


def nearest_code(x: Tensor, codebook: Tensor, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    distances = torch.empty(x.shape[:-1] if return_distance else (0,), dtype=torch.float32, device=x.device)
    if indices.numel() == 0:
        return indices, distances
    rows = as_rows(x)
    sizes = (rows.num_rows, rows.num_features, *rows.strides)
    search(rows, codebook, indices, precision)
    if return_distance:
        grid = (triton.cdiv(rows.num_rows, 64),)
        with on_device(x):
            _distance_kernel[grid](
                rows.tensor, codebook, indices, distances, *sizes, *codebook.stride(), BLOCK_N=64, BLOCK_D=64
            )
    return indices, distances


def search(rows: Rows, codebook: Tensor, indices: Tensor, precision: str) -> None:
    """Write the index of the nearest code of each row into `indices` [...] int64."""
    x = rows.tensor
    num_codes = len(codebook)
    # Products of half-precision inputs of one type are exact in float32 as they are.
    splits_parts = precision != "tf32" and (x.dtype == torch.float32 or codebook.dtype != x.dtype)
    dtype = torch.float16 if splits_parts else x.dtype
    certify = precision == "exact"
    config = search_config(rows.num_features, dtype, splits_parts, certify)
    parts = codebook_parts(codebook, config, dtype, splits_parts)
    tiles = triton.cdiv(num_codes, config.block_k)
    splits = num_splits(rows.num_rows, tiles, config)
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    is_whole = splits == 1 and not certify

    def buffer(wanted: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=x.device)

    n = rows.num_rows
    found = indices if is_whole else buffer(True, torch.int32, splits, n)
    score = buffer(True, torch.float32, splits, n)
    second, bound = buffer(certify, torch.float32, splits, n), buffer(certify, torch.float32, n)
    sizes = (n, rows.num_features, *rows.strides)
    block = [config.block_k, config.block_d]
    is_whole_row = config.block_d == config.padded(rows.num_features)
    with on_device(x):
        _nearest_code_fwd_kernel[(triton.cdiv(n, config.block_n), splits)](
            rows.tensor,
            TensorDescriptor.from_tensor(parts.high, block),
            TensorDescriptor.from_tensor(parts.low, block),
            parts.bias,
            parts.meta,
            found,
            score,
            second,
            bound,
            *sizes,
            num_codes,
            tiles,
            per_split,
            PADDED=config.padded(rows.num_features),
            SPLIT=splits_parts,
            CERTIFY=certify,
            PRECISION="tf32" if precision == "tf32" else "ieee",
            UPCAST=INTERPRETED,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_D=config.block_d,
            TILE_STAGES=config.num_stages if is_whole_row else 1,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
        )
        if is_whole:
            return
        worklist = buffer(certify, torch.int32, n)
        count = torch.zeros(int(certify), dtype=torch.int32, device=x.device)
        _join_splits_kernel[(triton.cdiv(n, 256),)](
            found, score, second, bound, indices, worklist, count, n, splits, CERTIFY=certify, BLOCK_N=256
        )
        if certify:
            _rescan_kernel[(min(n, _RESCAN_PROGRAMS),)](
                rows.tensor,
                codebook,
                indices,
                worklist,
                count,
                *sizes,
                num_codes,
                *codebook.stride(),
                BLOCK_K=64,
                BLOCK_D=32,
            )

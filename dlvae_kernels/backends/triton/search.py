"""The search behind `nearest_code` and `vector_quantize`: tiles of codes stream past a block of rows.

score = x . c - |c|^2 / 2, the largest is nearest. A float32 product is three products of float16 parts on the matrix
units (see `codebook_parts`); what the product of both low parts would add lies under float32 rounding. Codes
2i, 2i + 1 and those 8, 16 and 24 after them lie in one thread, so a group of them shares one running maximum and the
tile that it came from: under three instructions a distance. At the end exact differences tell a group's codes apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import autotune
from .codebook_parts import (
    FINER_BITS,
    NEVER,
    bias_shift,
    codebook_parts,
    codebook_shift,
    own_shift,
    power_of_two,
    row_shift,
    split,
)
from .distances import squared_distances
from .join_splits import join_splits
from .products import product
from .quantize_rows import Quantized, launch_quantize_rows, quantize_rows
from .rescan import error_bound, rescan
from .rows import Rows, as_rows, load_rows
from .tuning import INTERPRETED, SearchConfig, num_splits, on_device, search_config

INFINITE = tl.constexpr(3.4028236e38)
NO_CODE = tl.constexpr(2147483647)


class Found(NamedTuple):
    """What each split found, [splits, N]; second and bound [N] where certified: see `rescan`."""

    index: Tensor
    distance: Tensor
    score: Tensor | None
    second: Tensor | None
    bound: Tensor | None


@triton.jit
def _search_kernel(
    x,
    codes,
    high_parts,
    low_parts,
    bias_ptr,
    meta_ptr,
    found,
    out,
    num_tiles,
    tiles_per_split,
    distance_weight,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    LOOK_D: tl.constexpr,
    TILE_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Nearest code of each row among those of one split, its distance and score: [splits, N]."""
    CERTIFY: tl.constexpr = found.second is not None
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    features = tl.arange(0, BLOCK_D)
    num_features = x.num_features
    scale = 1.0
    if SPLIT or CERTIFY or x.tensor.dtype.element_ty != tl.float16:
        largest = tl.zeros([BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for d in range(0, PADDED, BLOCK_D):
            y = load_rows(x, n, d + features).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(y), axis=1))
            squares += tl.sum(y * y, axis=1)
    if SPLIT:
        shift = row_shift(tl.max(tl.where(largest < INFINITE, largest, 0.0), axis=0), meta_ptr, PACKED)
        scale = power_of_two(shift)
    if PACKED:
        row = load_rows(x, n, features % num_features)
        row_high, row_low = split(row.to(tl.float32), scale)
        part = (features // num_features)[None, :]
        bias_part = tl.minimum(tl.maximum(features - 3 * num_features, 0), 2)
        exponent = shift + codebook_shift(meta_ptr) - bias_shift(meta_ptr) - FINER_BITS * bias_part
        ones = power_of_two(exponent).to(tl.float16)
        row = tl.where(part == 1, row_low, tl.where(part < 3, row_high, ones[None, :]))
    elif BLOCK_D == PADDED:
        row = load_rows(x, n, features)
        if SPLIT:
            row, row_low = split(row.to(tl.float32), scale)
    LANES: tl.constexpr = BLOCK_K // GROUP
    best = tl.full([BLOCK_N, LANES], NEVER, tl.float32)
    tile_of_best = tl.zeros([BLOCK_N, LANES], tl.int32)
    if CERTIFY:
        second = tl.full([BLOCK_N, LANES], NEVER, tl.float32)
    begin = tl.program_id(1) * tiles_per_split
    # One of the two loops is pipelined: this one where a row is one block of features, else that over its blocks.
    for tile in tl.range(begin, tl.minimum(begin + tiles_per_split, num_tiles), num_stages=TILE_STAGES):
        score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if BLOCK_D == PADDED:
            high = high_parts.load([tile * BLOCK_K, 0])
            score = product(row, high.T, score, PRECISION, UPCAST)
            if SPLIT and not PACKED:
                low = low_parts.load([tile * BLOCK_K, 0])
                score = product(row_low, high.T, score, PRECISION, UPCAST)
                score = product(row, low.T, score, PRECISION, UPCAST)
        else:
            for block in tl.range(0, num_features, BLOCK_D, num_stages=STAGES):
                y = load_rows(x, n, block + features)
                high = high_parts.load([tile * BLOCK_K, block])
                if SPLIT:
                    y, y_low = split(y.to(tl.float32), scale)
                    low = low_parts.load([tile * BLOCK_K, block])
                    score = product(y_low, high.T, score, PRECISION, UPCAST)
                    score = product(y, low.T, score, PRECISION, UPCAST)
                score = product(y, high.T, score, PRECISION, UPCAST)
        if not PACKED:
            score += (tl.load(bias_ptr + tile * BLOCK_K + columns) * scale)[None, :]
        groups = tl.reshape(score, [BLOCK_N, BLOCK_K // (4 * GROUP), GROUP // 2, 4, 2])
        most = tl.reshape(tl.max(tl.max(groups, axis=4), axis=2), [BLOCK_N, LANES])
        # False for NaN: it never wins. Of equal scores in a lane the earlier tile stays.
        is_better = most > best
        if CERTIFY:
            second = tl.where(is_better, best, tl.maximum(most, second))
        best = tl.where(is_better, most, best)
        tile_of_best = tl.where(is_better, tile, tile_of_best)
    winner = tl.max(best, axis=1)
    lanes = tl.arange(0, LANES)
    # The first code of the group of each lane that has the best score.
    firsts = tile_of_best * BLOCK_K + ((lanes // 4) * (4 * GROUP) + (lanes % 4) * 2)[None, :]
    firsts = tl.where((best == winner[:, None]) & (best > NEVER), firsts, NO_CODE)
    if CERTIFY:
        # Of a tie within one lane the other score is in `second`; of one between lanes, in `best`.
        first = tl.min(firsts, axis=1)
        other = tl.max(tl.where(firsts == first[:, None], second, best), axis=1)
    # Differences are scaled so that squares of neither codes nor rows overflow. Those of float16 do not beyond 2^40.
    distance_shift = tl.full([BLOCK_N], 40, tl.int32)
    if SPLIT or CERTIFY or x.tensor.dtype.element_ty != tl.float16:
        distance_shift = own_shift(largest)
    distance_shift = tl.minimum(distance_shift, codebook_shift(meta_ptr))
    index, distance = _tell_apart(x, codes, bias_ptr, n, firsts, distance_shift, GROUP, BLOCK_K, LOOK_D)
    is_lost = distance == float("inf")
    length = power_of_two(-distance_shift)
    distance = distance * distance_weight * length * length
    if tl.max(is_lost.to(tl.int32), axis=0) > 0:
        # No distance is finite: a row that holds NaN takes 0, another one the first code that is not NaN.
        has_nan = tl.zeros([BLOCK_N], tl.int32)
        for d in range(0, PADDED, BLOCK_D):
            y = load_rows(x, n, d + features)
            has_nan = tl.maximum(has_nan, tl.max((y != y).to(tl.int32), axis=1))
        kept = -tl.load(meta_ptr + 1)
        fallback = tl.where((has_nan > 0) | (kept >= codes.num_rows), 0, kept)
        distance = tl.where(is_lost & (has_nan > 0), float("nan"), distance)
        index = tl.where(is_lost, fallback, index)
    mask = n < x.num_rows
    at = tl.program_id(1).to(tl.int64) * x.num_rows + n
    tl.store(found.index + at, index.to(found.index.dtype.element_ty), mask=mask)
    tl.store(found.distance + at, distance, mask=mask)
    if CERTIFY:
        tl.store(found.score + at, winner, mask=mask)
        tl.store(found.second + at, other, mask=mask)
        bound = error_bound(largest, squares, scale, meta_ptr, num_features, SPLIT)
        tl.store(found.bound + n, bound, mask=mask)
    if out is not None:
        quantize_rows(x, codes, out, n, index, 16)


@triton.jit
def _tell_apart(x, codes, bias_ptr, n, firsts, shift, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, LOOK_D: tl.constexpr):
    """The nearest code of rows n, by differences, among the groups that begin at `firsts` [BLOCK_N, lanes]."""
    in_group = tl.arange(0, GROUP)
    in_group = ((in_group // 2) * 8 + in_group % 2)[None, :]
    first = tl.min(firsts, axis=1)
    distance = tl.full(first.shape, float("inf"), tl.float32)
    index = tl.full(first.shape, NO_CODE, tl.int32)
    first_tile = first // BLOCK_K
    pending = first < NO_CODE
    # Once, and again for each further group of the same tile that ties: its codes may come before.
    while tl.max(pending.to(tl.int32), axis=0) > 0:
        group = tl.where(pending[:, None], first[:, None] + in_group, codes.num_rows)
        is_code = tl.load(bias_ptr + group, mask=group < codes.num_rows, other=NEVER) > NEVER
        squared = squared_distances(x, codes, n, group, power_of_two(shift)[:, None, None], LOOK_D)
        squared = tl.where(is_code & (squared == squared), squared, float("inf"))
        least = tl.min(squared, axis=1)
        code = tl.min(tl.where(is_code & (squared == least[:, None]), group, NO_CODE), axis=1)
        is_nearer = (least < distance) | ((least == distance) & (code < index))
        distance = tl.where(is_nearer, least, distance)
        index = tl.where(is_nearer, code, index)
        first = tl.min(tl.where(firsts > first[:, None], firsts, NO_CODE), axis=1)
        pending = (first < NO_CODE) & (first // BLOCK_K == first_tile)
    return index, distance


def search(
    rows: Rows, codebook: Tensor, precision: str, indices: Tensor, distances: Tensor, out: Quantized | None = None
) -> None:
    """Write the nearest code of each row, [N] int64, its squared distance, [N] float32, and `out` if it is given.

    With `out`, distances are divided by D: sums of squares may overflow float32 where their mean does not.
    """
    x = rows.tensor
    num_codes = len(codebook)
    # Products of half-precision inputs of one type are exact in float32 as they are.
    splits_parts = codebook.dtype != x.dtype or (x.dtype == torch.float32 and precision != "tf32")
    with on_device(x):
        config = search_config(
            rows.num_features,
            num_codes,
            torch.float16 if splits_parts else x.dtype,
            splits_parts,
            precision == "exact",
        )
        if autotune.is_wanted():
            kind = f"{x.dtype} {codebook.dtype} {precision} D={rows.num_features}"
            config = autotune.tuned(
                config,
                rows.num_rows,
                num_codes,
                kind,
                lambda config: _search(rows, codebook, precision, splits_parts, indices, distances, None, config),
            )
        _search(rows, codebook, precision, splits_parts, indices, distances, out, config)


def _search(
    rows: Rows,
    codebook: Tensor,
    precision: str,
    splits_parts: bool,
    indices: Tensor,
    distances: Tensor,
    out: Quantized | None,
    config: SearchConfig,
) -> None:
    x = rows.tensor
    num_codes = len(codebook)
    certify = precision == "exact"
    distance_weight = 1.0 if out is None else 1.0 / rows.num_features
    parts = codebook_parts(codebook, config, torch.float16 if splits_parts else x.dtype, splits_parts)
    tiles = triton.cdiv(num_codes, config.block_k)
    splits = num_splits(rows.num_rows, tiles, config)
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    is_whole = splits == 1 and not certify

    def buffer(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    n = rows.num_rows
    if is_whole:
        found = Found(indices, distances, None, None, None)
    else:
        found = Found(buffer(torch.int32, splits, n), buffer(torch.float32, splits, n), None, None, None)
    if certify:
        score, second = buffer(torch.float32, 2, splits, n)
        found = found._replace(score=score, second=second, bound=buffer(torch.float32, n))
    codes = as_rows(codebook)
    block = [config.block_k, config.block_d]
    is_whole_row = config.block_d == config.padded(rows.num_features)
    _search_kernel[(triton.cdiv(n, config.block_n), splits)](
        rows,
        codes,
        TensorDescriptor.from_tensor(parts.high, block),
        TensorDescriptor.from_tensor(parts.low, block),
        parts.bias,
        parts.meta,
        found,
        out if is_whole else None,
        tiles,
        per_split,
        distance_weight,
        PADDED=config.padded(rows.num_features),
        SPLIT=splits_parts,
        PACKED=config.packed,
        PRECISION="tf32" if precision == "tf32" else "ieee",
        UPCAST=INTERPRETED,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        GROUP=config.group,
        LOOK_D=config.look_d,
        TILE_STAGES=config.num_stages if is_whole_row else 1,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
    )
    if not is_whole:
        worklist, count = join_splits(found, indices, distances)
        if certify:
            rescan(rows, codes, parts.meta, indices, distances, worklist, count, distance_weight)
        if out is not None:
            launch_quantize_rows(rows, codebook, indices, out)

"""The certificate of `precision="exact"`: rows whose two best scores are too close are searched anew in float32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .codebook_parts import codebook_shift, own_shift, power_of_two
from .rows import Rows, load_codes, row_offsets

# Of a score, over |x| |c| + |c|^2 / 2: what float16 parts and float32 accumulation may be off by; as matrix units cut
# off at each of their steps, it grows with D.
ERROR = tl.constexpr(2.0**-19)
_PROGRAMS = 1024


@triton.jit
def error_bound(largest, squares, scale, meta_ptr, num_features, SPLIT: tl.constexpr):
    """How much the difference of two scores of a row may be off, in the units of the scores: [BLOCK_N]."""
    features = tl.cast(num_features, tl.float32)
    # The largest bias b of a code bounds all |c|.
    bias = power_of_two(tl.minimum(tl.load(meta_ptr + 2) + 1, 127))
    code = tl.sqrt(2.0 * bias)
    shift = 1.0
    if SPLIT:
        shift = power_of_two(codebook_shift(meta_ptr))
    error = 2.0 * ERROR * (1.0 + features / 85.0)
    bound = ((tl.sqrt(squares) * scale) * (code * shift) + (bias * shift) * scale) * error
    if SPLIT:
        # The parts of a row, beside the largest of its block, are off by 2^-25 of a unit each; of one that was cut
        # off, nothing is known.
        bound += 2.0**-23 * tl.sqrt(features) * (code * shift)
        bound = tl.where(largest * scale < 2.0**15, bound, float("inf"))
    return bound


@triton.jit
def _rescan_kernel(
    x,
    codes,
    index_ptr,
    distance_ptr,
    worklist_ptr,
    count_ptr,
    meta_ptr,
    distance_weight,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of the worklist anew, by differences in float32; each program takes every P-th of them."""
    count = tl.load(count_ptr)
    columns = tl.arange(0, BLOCK_K)
    for place in range(tl.program_id(0), count, tl.num_programs(0)):
        row = tl.load(worklist_ptr + place)
        start = row_offsets(x, row)
        # Squares of neither codes nor the row overflow.
        largest = tl.zeros([], tl.float32)
        for d in range(0, x.num_features, BLOCK_D):
            features = d + tl.arange(0, BLOCK_D)
            at = x.tensor + start + features.to(tl.int64) * x.stride_d
            y = tl.load(at, mask=features < x.num_features, other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(y.to(tl.float32)), axis=0))
        shift = tl.minimum(codebook_shift(meta_ptr), own_shift(largest))
        best = tl.full([], float("inf"), tl.float32)
        index = tl.load(index_ptr + row).to(tl.int32)
        for begin in range(0, codes.num_rows, BLOCK_K):
            k = begin + columns
            distance = tl.zeros([BLOCK_K], tl.float32)
            for d in range(0, x.num_features, BLOCK_D):
                features = d + tl.arange(0, BLOCK_D)
                at = x.tensor + start + features.to(tl.int64) * x.stride_d
                y = tl.load(at, mask=features < x.num_features, other=0.0)
                c = load_codes(codes, k, features)
                difference = (y.to(tl.float32)[None, :] - c.to(tl.float32)) * power_of_two(shift)
                distance += tl.sum(difference * difference, axis=1)
            distance = tl.where((k < codes.num_rows) & (distance == distance), distance, float("inf"))
            smallest = tl.min(distance, axis=0)
            if smallest < best:
                best = smallest
                index = tl.min(tl.where(distance == smallest, k, 2147483647), axis=0)
        # A row without any finite distance stays as it was found.
        unit = power_of_two(-shift)
        tl.store(index_ptr + row, index.to(tl.int64), mask=best < float("inf"))
        tl.store(distance_ptr + row, best * distance_weight * unit * unit, mask=best < float("inf"))


def rescan(
    rows: Rows,
    codes: Rows,
    meta: Tensor,
    indices: Tensor,
    distances: Tensor,
    worklist: Tensor,
    count: Tensor,
    distance_weight: float,
) -> None:
    """Search the rows of a worklist, of which there are `count` [1], by differences in float32.

    Squared distances are written times `distance_weight`.
    """
    _rescan_kernel[(min(rows.num_rows, _PROGRAMS),)](
        rows,
        codes,
        indices,
        distances,
        worklist,
        count,
        meta,
        distance_weight,
        BLOCK_K=64,
        BLOCK_D=32,
        maxnreg=128,
    )

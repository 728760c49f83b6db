"""Where programs share the codes of one block of rows: the best of what each of them found."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 256


@triton.jit
def _join_splits_kernel(
    found, index_ptr, distance_ptr, worklist_ptr, count_ptr, num_rows, splits, BLOCK_N: tl.constexpr
):
    """The best of all splits, the earliest of equal ones; rows with two scores too close go on the worklist."""
    CERTIFY: tl.constexpr = found.second is not None
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < num_rows
    index = tl.load(found.index + rows, mask=mask, other=0)
    distance = tl.load(found.distance + rows, mask=mask, other=0.0)
    if CERTIFY:
        best = tl.load(found.score + rows, mask=mask, other=0.0)
        second = tl.load(found.second + rows, mask=mask, other=0.0)
    for part in range(1, splits):
        at = tl.cast(part, tl.int64) * num_rows + rows
        apart = tl.load(found.distance + at, mask=mask, other=0.0)
        index = tl.where(apart < distance, tl.load(found.index + at, mask=mask, other=0), index)
        distance = tl.where(apart < distance, apart, distance)
        if CERTIFY:
            score = tl.load(found.score + at, mask=mask, other=0.0)
            other = tl.load(found.second + at, mask=mask, other=0.0)
            second = tl.maximum(tl.minimum(best, score), tl.where(score > best, other, second))
            best = tl.maximum(best, score)
    tl.store(index_ptr + rows, index.to(tl.int64), mask=mask)
    tl.store(distance_ptr + rows, distance, mask=mask)
    if CERTIFY:
        # Also where the difference is not a number.
        is_close = ((best - second > tl.load(found.bound + rows, mask=mask, other=0.0)) == 0) & mask
        places = tl.atomic_add(count_ptr + tl.zeros_like(rows), 1, mask=is_close)
        tl.store(worklist_ptr + places, rows, mask=is_close)


def join_splits(found: Any, indices: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Write indices and distances [N] from what each split found.

    Returns:
        The rows that have to be searched anew, and their number [1].
    """
    splits, n = found.index.shape
    certify = found.second is not None
    worklist = torch.empty(n if certify else 0, dtype=torch.int32, device=indices.device)
    count = torch.zeros(int(certify), dtype=torch.int32, device=indices.device)
    _join_splits_kernel[(triton.cdiv(n, _BLOCK_N),)](
        found, indices, distances, worklist, count, n, splits, BLOCK_N=_BLOCK_N
    )
    return worklist, count

"""Where programs share the codes of one block of rows: the best of what each of them found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 256


@triton.jit
def _join_splits_kernel(
    part_index_ptr,
    part_distance_ptr,
    score_ptr,
    second_ptr,
    bound_ptr,
    index_ptr,
    distance_ptr,
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
    index = tl.load(part_index_ptr + rows, mask=mask, other=0)
    distance = tl.load(part_distance_ptr + rows, mask=mask, other=0.0)
    if CERTIFY:
        best = tl.load(score_ptr + rows, mask=mask, other=0.0)
        second = tl.load(second_ptr + rows, mask=mask, other=0.0)
    for part in range(1, splits):
        at = tl.cast(part, tl.int64) * num_rows + rows
        apart = tl.load(part_distance_ptr + at, mask=mask, other=0.0)
        index = tl.where(apart < distance, tl.load(part_index_ptr + at, mask=mask, other=0), index)
        distance = tl.where(apart < distance, apart, distance)
        if CERTIFY:
            score = tl.load(score_ptr + at, mask=mask, other=0.0)
            other = tl.load(second_ptr + at, mask=mask, other=0.0)
            second = tl.maximum(tl.minimum(best, score), tl.where(score > best, other, second))
            best = tl.maximum(best, score)
    tl.store(index_ptr + rows, index.to(tl.int64), mask=mask)
    tl.store(distance_ptr + rows, distance, mask=mask)
    if CERTIFY:
        # Also where the difference is not a number.
        is_close = ((best - second > tl.load(bound_ptr + rows, mask=mask, other=0.0)) == 0) & mask
        places = tl.atomic_add(count_ptr + tl.zeros_like(rows), 1, mask=is_close)
        tl.store(worklist_ptr + places, rows, mask=is_close)


def join_splits(
    found: Tensor,
    apart: Tensor,
    score: Tensor,
    second: Tensor,
    bound: Tensor,
    indices: Tensor,
    distances: Tensor,
    certify: bool,
) -> tuple[Tensor, Tensor]:
    """Write indices and distances [N] from those of each split, [splits, N].

    Args:
        score, second, bound: the best score and the second best, [splits, N], and by how much the difference of two
            may be off, [N]; empty unless they are certified.
    Returns:
        The rows that have to be searched anew, and their number [1].
    """
    splits, n = found.shape
    worklist = torch.empty(n if certify else 0, dtype=torch.int32, device=found.device)
    count = torch.zeros(int(certify), dtype=torch.int32, device=found.device)
    _join_splits_kernel[(triton.cdiv(n, _BLOCK_N),)](
        found,
        apart,
        score,
        second,
        bound,
        indices,
        distances,
        worklist,
        count,
        n,
        splits,
        CERTIFY=certify,
        BLOCK_N=_BLOCK_N,
    )
    return worklist, count

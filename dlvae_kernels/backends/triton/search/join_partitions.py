"""The join of the results of programs that search different partitions of the codes for the same vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 256


class Found(NamedTuple):
    """The results of each partition of the codes, [partitions, N].

    indices, distances: the nearest code and its squared distance.
    scores, seconds: the best score and the runner-up, or None without a certificate.
    bounds: [N], the error bound of the difference of both, or None.
    """

    indices: Tensor
    distances: Tensor
    scores: Tensor | None = None
    seconds: Tensor | None = None
    bounds: Tensor | None = None


@triton.jit
def _join_partitions_kernel(
    found, index_ptr, distance_ptr, worklist_ptr, count_ptr, num_vectors, partitions, BLOCK_N: tl.constexpr
):
    """Write the best of all partitions, of equal ones the first, and put uncertain vectors on the worklist."""
    CERTIFY: tl.constexpr = found.seconds is not None
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < num_vectors
    index = tl.load(found.indices + n, mask=mask, other=0)
    distance = tl.load(found.distances + n, mask=mask, other=0.0)
    if CERTIFY:
        best = tl.load(found.scores + n, mask=mask, other=0.0)
        second = tl.load(found.seconds + n, mask=mask, other=0.0)
    for partition in range(1, partitions):
        at = tl.cast(partition, tl.int64) * num_vectors + n
        next_distance = tl.load(found.distances + at, mask=mask, other=0.0)
        is_nearer = next_distance < distance
        index = tl.where(is_nearer, tl.load(found.indices + at, mask=mask, other=0), index)
        distance = tl.where(is_nearer, next_distance, distance)
        if CERTIFY:
            score = tl.load(found.scores + at, mask=mask, other=0.0)
            next_second = tl.load(found.seconds + at, mask=mask, other=0.0)
            second = tl.maximum(tl.minimum(best, score), tl.where(score > best, next_second, second))
            best = tl.maximum(best, score)
    tl.store(index_ptr + n, index.to(tl.int64), mask=mask)
    tl.store(distance_ptr + n, distance, mask=mask)
    if CERTIFY:
        # The negated comparison is true for NaN.
        is_uncertain = ((best - second > tl.load(found.bounds + n, mask=mask, other=0.0)) == 0) & mask
        places = tl.atomic_add(count_ptr + tl.zeros_like(n), 1, mask=is_uncertain)
        tl.store(worklist_ptr + places, n, mask=is_uncertain)


def join_partitions(found: Found, indices: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Write indices and distances [N] from the results of each partition.

    Returns:
        The worklist of uncertain vectors, and their number [1]; both empty without a certificate.
    """
    partitions, n = found.indices.shape
    certifies = found.seconds is not None
    worklist = torch.empty(n if certifies else 0, dtype=torch.int32, device=indices.device)
    count = torch.zeros(int(certifies), dtype=torch.int32, device=indices.device)
    _join_partitions_kernel[(triton.cdiv(n, _BLOCK_N),)](
        found, indices, distances, worklist, count, n, partitions, BLOCK_N=_BLOCK_N
    )
    return worklist, count

"""Sums over the ranks of torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def _world(sync: bool) -> tuple[int, int]:
    """(rank, number of ranks) at this moment, never cached: (0, 1) without torch.distributed or with sync off."""
    if sync and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def num_ranks(sync: bool) -> int:
    return _world(sync)[1]


def all_reduce_sum(tensor: Tensor, sync: bool) -> Tensor:
    """The sum of `tensor` over all ranks, in place if there is more than one."""
    if num_ranks(sync) > 1:
        dist.all_reduce(tensor)
    return tensor


def sample_vectors(x: Tensor, count: int, sync: bool) -> Tensor:
    """`count` random vectors of x [..., D], each followed by a one, to be summed over the ranks: [count, D + 1].

    Vector i comes from rank i modulo the number of ranks and is zero on the others, so that all ranks hold the same
    vectors after the sum. Where that rank has no vectors, or the vector is not finite, all D + 1 elements are zero.
    The vectors are drawn from torch's random stream, without repeats while there are enough; float32 or wider.
    """
    vectors = x.detach().reshape(-1, x.shape[-1])
    rank, ranks = _world(sync)
    sampled = torch.zeros(count, x.shape[-1] + 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if len(vectors) > 0:
        own = sampled[rank::ranks]
        order = torch.randperm(len(vectors), device=x.device)
        selected = vectors[order[torch.arange(len(own), device=x.device) % len(vectors)]]
        is_finite = selected.isfinite().all(1, keepdim=True)
        own[:, :-1] = torch.where(is_finite, selected, 0)
        own[:, -1:] = is_finite
    return sampled

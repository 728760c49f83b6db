"""Sums over the ranks of torch.distributed."""

from __future__ import annotations

from typing import Any

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


def sample_vectors(x: Tensor, count: int, sync: bool, generator: torch.Generator | None = None) -> Tensor:
    """`count` random vectors of x [..., D], each followed by a one, to be summed over the ranks: [count, D + 1].

    Vector i comes from rank i modulo the number of ranks and is zero on the others, so that all ranks hold the same
    vectors after the sum. Where that rank has no vectors, or the vector is not finite, all D + 1 elements are zero.
    The vectors are drawn by the generator or torch's random stream, without repeats while there are enough; float32 or
    wider.
    """
    vectors = x.detach().reshape(-1, x.shape[-1])
    rank, ranks = _world(sync)
    sampled = torch.zeros(count, x.shape[-1] + 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if len(vectors) > 0:
        own = sampled[rank::ranks]
        order = torch.randperm(len(vectors), generator=generator, device=x.device)
        selected = vectors[order[torch.arange(len(own), device=x.device) % len(vectors)]]
        is_finite = selected.isfinite().all(1, keepdim=True)
        own[:, :-1] = torch.where(is_finite, selected, 0)
        own[:, -1:] = is_finite
    return sampled


def farthest_vectors(x: Tensor, distances: Tensor, count: int, sync: bool) -> Tensor:
    """The vectors of x [..., D] with the largest distances [...], in the form of `sample_vectors`: [count, D + 1].

    Vector i comes from rank i modulo the number of ranks, the farthest first. Vectors whose distance is 0 or not finite
    are left out.
    """
    rank, ranks = _world(sync)
    found = torch.zeros(count, x.shape[-1] + 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    own = found[rank::ranks][: distances.numel()]
    largest, positions = torch.where(distances.isfinite(), distances, 0).flatten().topk(len(own))
    is_valid = (largest > 0)[:, None]
    # A flat view of x may need a copy, and torch.unravel_index copies the shape to the device.
    places: list[Tensor] = []
    for size in reversed(distances.shape):
        places.insert(0, positions % size)
        positions = positions // size
    own[:, :-1] = torch.where(is_valid, x[tuple(places)], 0)
    own[:, -1:] = is_valid
    return found


class _AllReduceSum(torch.autograd.Function):
    """The sum over all ranks. Each rank's loss depends on the tensors of all, so gradients are summed over them too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_reduce_mean(mean: Tensor, count: Tensor | float, sync: bool) -> Tensor:
    """The mean over the vectors of all ranks, from the mean of each rank over its `count` vectors; differentiable.

    Every rank must call it, in the backward pass too. The gradient is that of the sum of the losses of all ranks:
    averaged over the ranks, as DistributedDataParallel does, it is that of one process on the whole batch, if every
    rank adds the same loss of the result. A rank without vectors counts nothing; without any, the mean is 0.
    """
    if num_ranks(sync) == 1:
        return mean
    counts = torch.as_tensor(count, dtype=mean.dtype, device=mean.device).detach().reshape(1)
    sums = _AllReduceSum.apply(torch.cat([torch.where(counts > 0, mean * counts, 0).flatten(), counts]))
    return (sums[:-1] / sums[-1].detach().clamp(min=1)).view_as(mean)

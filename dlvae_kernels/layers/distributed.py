"""Sums over the ranks of torch.distributed, and random vectors of the batch of all ranks."""

from __future__ import annotations

import math
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


def check_exportable(owner: str, sync: bool) -> None:
    """Refuse to export a training step whose sums over the ranks the graph would lack."""
    if torch.compiler.is_exporting() and num_ranks(sync) > 1:
        raise ValueError(
            f"{owner} cannot be exported in train mode while ranks all-reduce: export it in one process, construct it"
            " with sync=False, or call .eval()"
        )


def all_reduce_sum(tensor: Tensor, sync: bool) -> Tensor:
    """The sum of `tensor` over all ranks, which may overwrite it."""
    if num_ranks(sync) > 1:
        # An all-reduce of a strided view would add other elements.
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_sums(tensors: list[Tensor], sync: bool) -> list[Tensor]:
    """The sums of tensors of one dtype over all ranks, by one all-reduce."""
    if num_ranks(sync) == 1:
        return tensors
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed)
    sums = packed.split([tensor.numel() for tensor in tensors])
    return [flat.view_as(tensor) for flat, tensor in zip(sums, tensors, strict=True)]


def random_places(jitter: Tensor, num_vectors: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Places of random vectors of a batch without repeats, [..., M], and whether each is valid.

    The batch is divided into M strata of equal size, up to one, and each gives one vector. With fewer vectors than M
    some strata are empty, and their places are not valid.

    Args:
        jitter: [..., M] in [0, 1): the place within each stratum.
        num_vectors: N > 0.
        mask: [N] bool, True for the vectors to draw from; never read by the host.
    """
    count = jitter.shape[-1]
    rank = None if mask is None else mask.flatten().cumsum(0)
    total = num_vectors if rank is None else rank[-1]
    starts = torch.arange(count + 1, device=jitter.device) * total // count
    size = starts[1:] - starts[:-1]
    places = starts[:-1] + (jitter.double() * size).long()
    if rank is not None:
        # The vector number p of those to draw from is the first one with a rank of p + 1.
        places = torch.searchsorted(rank, places + 1)
    return places.clamp(max=num_vectors - 1), (size > 0).expand_as(places)


def sample_vectors(x: Tensor, jitter: Tensor, sync: bool, mask: Tensor | None = None) -> Tensor:
    """Random vectors of x [..., D], each followed by a one, to be summed over the ranks: [M, D + 1].

    Vector i comes from rank i modulo the number of ranks and is zero on the others, so that all ranks hold the same
    vectors after the sum. Where that rank has too few vectors, or the vector is not finite, all D + 1 elements are
    zero. With heads, x [..., H, D] and jitter [H, M] give [H, M, D + 1]. The result is float32 or wider.

    Args:
        jitter: [M] or [H, M], random numbers in [0, 1).
        mask: [...] bool without the heads: True for the vectors to draw from.
    """
    heads = jitter.shape[:-1]
    leading = x.shape[: x.ndim - 1 - len(heads)]
    rank, ranks = _world(sync)
    dtype = torch.promote_types(x.dtype, torch.float32)
    sampled = torch.zeros(*jitter.shape, x.shape[-1] + 1, dtype=dtype, device=x.device)
    own = sampled[..., rank::ranks, :]
    if leading.numel() > 0 and own.shape[-2] > 0:
        places, is_valid = random_places(jitter[..., rank::ranks], leading.numel(), mask)
        head = [torch.arange(heads[0], device=x.device)[:, None]] if heads else []
        selected = x.detach()[(*unraveled(places, leading), *head)]
        is_valid = is_valid[..., None] & (selected.abs() < math.inf).all(-1, keepdim=True)
        own[..., :-1] = torch.where(is_valid, selected, 0)
        own[..., -1:] = is_valid
    return sampled


def unraveled(places: Tensor, shape: torch.Size) -> list[Tensor]:
    """The indices of places in each dimension of a shape; flattening a channel-first map would copy it."""
    indices: list[Tensor] = []
    for size in reversed(shape[1:]):
        indices.insert(0, places % size)
        places = places // size
    return [places, *indices]


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

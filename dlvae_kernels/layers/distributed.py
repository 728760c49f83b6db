"""Sums over the ranks of torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world(sync: bool) -> tuple[int, int]:
    """(rank, number of ranks) as it is now, never cached: (0, 1) without torch.distributed or with sync off."""
    if sync and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sum(tensor: Tensor, sync: bool) -> Tensor:
    """The sum of `tensor` over all ranks, in place where there is more than one."""
    if world(sync)[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def sample_rows(x: Tensor, count: int, sync: bool) -> Tensor:
    """`count` random rows of x [..., D], as [count, D] float32 or wider, to be summed over the ranks.

    Row i comes from rank i modulo the number of ranks and is zero on the others, so that after the sum all ranks
    hold the same rows. Drawn from torch's random stream, without repeats while there are enough rows.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    total = len(rows)
    if total == 0:
        raise ValueError(f"inputs has shape {tuple(x.shape)}; drawing codes from it needs at least one row")
    order = torch.randperm(total, device=x.device)
    chosen = rows[order[torch.arange(count, device=x.device) % total]]
    rank, ranks = world(sync)
    is_mine = torch.arange(count, device=x.device) % ranks == rank
    return torch.where(is_mine[:, None], chosen, 0).to(torch.promote_types(x.dtype, torch.float32))

"""Reference of `ema_update`: the statistics of a batch, and the update of the moving averages by them."""

from __future__ import annotations

import torch
from torch import Tensor

from .segment_sum import segment_sum


def ema_statistics(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    vectors = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))  # [N, D]
    # A vector that is not finite would make the averages NaN or infinite for good.
    finite = vectors.isfinite().all(1).nonzero().squeeze(1)
    codes = indices.flatten()[finite]
    counts = torch.bincount(codes, minlength=num_codes)
    return torch.cat([segment_sum(vectors, finite, codes, num_codes, None), counts[:, None].to(vectors.dtype)], dim=1)


def ema_step(
    codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, statistics: Tensor, decay: float, epsilon: float
) -> None:
    counts = statistics[:, -1]  # [K]
    cluster_size.lerp_(counts.to(cluster_size.dtype), 1 - decay)
    embed_sum.lerp_(statistics[:, :-1].to(embed_sum.dtype), 1 - decay)
    total = cluster_size.sum()
    smoothed = (cluster_size + epsilon) / (total + len(codebook) * epsilon) * total  # [K]
    # A code that no vector is assigned to is not changed: smoothing would pull it to the origin step by step.
    is_used = (counts > 0) & (cluster_size > 0)
    codebook.copy_(torch.where(is_used[:, None], embed_sum / smoothed[:, None], codebook))

"""Reference of `ema_update`: the statistics of a batch, and the update of the moving averages by them."""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import codes_of_heads
from .segment_sum import segment_sum


def ema_statistics(x: Tensor, indices: Tensor, num_codes: int, num_heads: int) -> Tensor:
    vectors = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))  # [N, D]
    # A vector that is not finite would make the averages NaN or infinite for good.
    codes = codes_of_heads(indices, num_codes, num_heads)
    kept = (vectors.isfinite().all(1) & (codes >= 0)).nonzero().squeeze(1)
    counts = torch.bincount(codes[kept], minlength=num_heads * num_codes)
    sums = segment_sum(vectors, kept, codes[kept], num_heads * num_codes, None)
    return torch.cat([sums, counts[:, None].to(vectors.dtype)], dim=1)


def ema_step(
    codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, statistics: Tensor, decay: float, epsilon: float
) -> None:
    counts = statistics[..., -1]  # [K], or [H, K] with heads
    cluster_size.lerp_(counts.to(cluster_size.dtype), 1 - decay)
    embed_sum.lerp_(statistics[..., :-1].to(embed_sum.dtype), 1 - decay)
    total = cluster_size.sum(-1, keepdim=True)
    smoothed = (cluster_size + epsilon) / (total + codebook.shape[-2] * epsilon) * total
    # A code that no vector is assigned to is not changed: smoothing would pull it to the origin step by step.
    is_used = (counts > 0) & (cluster_size > 0)
    codebook.copy_(torch.where(is_used[..., None], embed_sum / smoothed[..., None], codebook))

"""Triton `ema_update`: statistics of a batch, and one pass that moves averages and codebook."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum import segment_sum
from .tuning import on_device


@triton.jit
def _ema_step_kernel(
    codebook_ptr,
    size_ptr,
    sum_ptr,
    statistics_ptr,
    total_ptr,
    num_codes,
    num_features,
    stride_ck,
    stride_cd,
    stride_sk,
    stride_sd,
    stride_tk,
    stride_td,
    weight,
    epsilon,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum <- sum + weight * (batch sum - sum); codebook <- sum / smoothed size, where a row took the code."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = k < num_codes
    mask = inside[:, None] & (d < num_features)[None, :]
    k, d = k.to(tl.int64), d.to(tl.int64)
    count = tl.load(statistics_ptr + k * stride_tk + num_features.to(tl.int64) * stride_td, mask=inside, other=0.0)
    size = tl.load(size_ptr + k, mask=inside, other=1.0)
    total = tl.load(total_ptr)
    smoothed = (size + epsilon) / (total + num_codes * epsilon) * total
    batch = tl.load(statistics_ptr + k[:, None] * stride_tk + d[None, :] * stride_td, mask=mask, other=0.0)
    at = k[:, None] * stride_sk + d[None, :] * stride_sd
    old = tl.load(sum_ptr + at, mask=mask, other=0.0)
    # As torch.lerp, which is exact at both ends.
    new = tl.where(weight < 0.5, old + weight * (batch - old), batch - (batch - old) * (1.0 - weight))
    tl.store(sum_ptr + at, new, mask=mask)
    # A code that no row took stays where it is: smoothing would pull it to the origin step by step.
    is_used = (count > 0) & (size > 0)
    moved = new / tl.where(is_used, smoothed, 1.0)[:, None]
    tl.store(codebook_ptr + k[:, None] * stride_ck + d[None, :] * stride_cd, moved, mask=mask & is_used[:, None])


def ema_statistics(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    return segment_sum(x, indices, num_codes, skip_infinite=True).contiguous()


def ema_step(
    codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, statistics: Tensor, decay: float, epsilon: float
) -> None:
    num_codes, num_features = codebook.shape
    cluster_size.lerp_(statistics[:, -1], 1 - decay)
    total = cluster_size.sum()
    grid = (triton.cdiv(num_codes, 32), triton.cdiv(num_features, 64))
    with on_device(codebook):
        _ema_step_kernel[grid](
            codebook,
            cluster_size.contiguous(),
            embed_sum,
            statistics,
            total,
            num_codes,
            num_features,
            *codebook.stride(),
            *embed_sum.stride(),
            *statistics.stride(),
            1 - decay,
            epsilon,
            BLOCK_K=32,
            BLOCK_D=64,
        )
    # Written by a kernel, which autograd and the cache of codebook parts do not see.
    torch.autograd.graph.increment_version((codebook, embed_sum))

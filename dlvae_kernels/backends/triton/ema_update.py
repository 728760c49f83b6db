"""Triton `ema_update`: statistics of a batch, and one pass that moves averages and codebook."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .one_hot_sum import one_hot_sum, suits
from .rows import as_rows, load_rows, row_offsets, store_rows
from .segment_sum import segment_sum
from .tuning import on_device


@triton.jit
def _finite_codes_kernel(x, index_ptr, code_ptr, num_codes, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The codes of rows; K for rows that hold NaN or infinity, or whose index is out of range."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    largest = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        y = tl.abs(load_rows(x, n, d).to(tl.float32))
        largest = tl.maximum(largest, tl.max(tl.where(y == y, y, float("inf")), axis=1))
    index = tl.load(index_ptr + n, mask=n < x.num_rows, other=0)
    is_kept = (largest < float("inf")) & (index >= 0) & (index < num_codes)
    tl.store(code_ptr + n, tl.where(is_kept, index, num_codes), mask=n < x.num_rows)


@triton.jit
def _ema_step_kernel(
    codebook,
    size_ptr,
    embed_sum,
    statistics,
    total_ptr,
    weight,
    epsilon,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum <- sum + weight * (batch sum - sum); codebook <- sum / smoothed size, where a row took the code."""
    num_codes, num_features = codebook.num_rows, codebook.num_features
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = k < num_codes
    at = row_offsets(statistics, k) + tl.cast(num_features, tl.int64) * statistics.stride_d
    count = tl.load(statistics.tensor + at, mask=inside, other=0.0)
    size = tl.load(size_ptr + k, mask=inside, other=1.0)
    total = tl.load(total_ptr)
    smoothed = (size + epsilon) / (total + num_codes * epsilon) * total
    batch, old = load_rows(statistics, k, d), load_rows(embed_sum, k, d)
    # As torch.lerp, which is exact at both ends.
    new = tl.where(weight < 0.5, old + weight * (batch - old), batch - (batch - old) * (1.0 - weight))
    store_rows(embed_sum, new, k, d)
    # A code that no row took stays where it is: smoothing would pull it to the origin step by step.
    is_used = (count > 0) & (size > 0)
    store_rows(codebook, new / tl.where(is_used, smoothed, 1.0)[:, None], tl.where(is_used, k, num_codes), d)


def ema_statistics(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    if x.numel() == 0:
        return torch.zeros(num_codes, x.shape[-1] + 1, dtype=torch.float32, device=x.device)
    rows = as_rows(x)
    codes = torch.empty(rows.num_rows, dtype=torch.int64, device=x.device)
    with on_device(x):
        _finite_codes_kernel[(triton.cdiv(rows.num_rows, 64),)](
            rows, indices.contiguous(), codes, num_codes, BLOCK_N=64, BLOCK_D=64
        )
    total = one_hot_sum if suits(rows, num_codes) else segment_sum
    return total(rows, codes, num_codes)


def ema_step(
    codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, statistics: Tensor, decay: float, epsilon: float
) -> None:
    num_codes, num_features = codebook.shape
    cluster_size.lerp_(statistics[:, -1], 1 - decay)
    total = cluster_size.sum()
    grid = (triton.cdiv(num_codes, 32), triton.cdiv(num_features, 64))
    with on_device(codebook):
        _ema_step_kernel[grid](
            as_rows(codebook),
            cluster_size.contiguous(),
            as_rows(embed_sum),
            as_rows(statistics),
            total,
            1 - decay,
            epsilon,
            BLOCK_K=32,
            BLOCK_D=64,
        )
    # Written by a kernel, which autograd and the cache of codebook parts do not see.
    torch.autograd.graph.increment_version((codebook, embed_sum))

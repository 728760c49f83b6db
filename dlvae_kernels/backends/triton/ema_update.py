"""Triton `ema_update`: the statistics of a batch, and two kernels that update the averages and the codebook."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architectures import on_device
from .language.rows import (
    Rows,
    as_codes,
    as_rows,
    code_offsets,
    codes_of_head,
    head_of_program,
    load_codes,
    load_rows,
    offset_of_head,
    store_codes,
    vectors_of_head,
)
from .sums.flat_codes import flat_code
from .sums.one_hot_sum import one_hot_sum, suits
from .sums.segment_sum import segment_sum


@triton.jit
def _finite_codes_kernel(x, index_ptr, code_ptr, num_codes, num_heads, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the `flat_code` of each vector; H * K (no code) also for a vector with NaN or infinity."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = head_of_program(x)
    place = vectors_of_head(x, head, n)
    if x.num_heads is not None:
        x = Rows(x.tensor + offset_of_head(x, head), x.num_vectors // x.num_heads, *x[2:8])
    largest = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, x.num_features, BLOCK_D):
        y = tl.abs(load_rows(x, n, begin + tl.arange(0, BLOCK_D)).to(tl.float32))
        largest = tl.maximum(largest, tl.max(tl.where(y == y, y, float("inf")), axis=1))
    index = tl.load(index_ptr + place, mask=n < x.num_vectors, other=0)
    code = flat_code(tl.where(largest < float("inf"), index, -1), place, num_codes, num_heads)
    tl.store(code_ptr + place, code, mask=n < x.num_vectors)


@triton.jit
def _lerp(old, new, weight):
    """The formula of torch.lerp, which is exact for weights 0 and 1."""
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))


@triton.jit
def _load_counts(statistics, k):
    """The counts of codes k, in the column after the D columns of statistics; 0 where k is out of range."""
    last = code_offsets(statistics, k) + tl.cast(statistics.num_features, tl.int64) * statistics.stride_d
    return tl.load(statistics.tensor + last, mask=k < statistics.num_codes, other=0.0)


@triton.jit
def _cluster_sizes_kernel(cluster_size, statistics, total_ptr, weight, BLOCK_K: tl.constexpr):
    """Move the cluster sizes of a head towards the counts of the batch by `weight`, and write their sum."""
    head = head_of_program(cluster_size)
    cluster_size, statistics = codes_of_head(cluster_size, head), codes_of_head(statistics, head)
    total = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, cluster_size.num_codes, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        at = cluster_size.tensor + code_offsets(cluster_size, k)
        is_code = k < cluster_size.num_codes
        size = _lerp(tl.load(at, mask=is_code, other=0.0), _load_counts(statistics, k), weight)
        tl.store(at, size, mask=is_code)
        total += tl.where(is_code, size, 0.0)
    tl.store(total_ptr + head, tl.sum(total, axis=0))


@triton.jit
def _ema_step_kernel(
    codebook,
    cluster_size,
    embed_sum,
    statistics,
    total_ptr,
    weight,
    epsilon,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Move embed_sum towards the sums of the batch by `weight`, and the codes to embed_sum / smoothed size.

    statistics: [K, D + 1], the sums of the batch, and in the last column its counts. With heads, each tensor has H in
        front, and total_ptr is [H].
    """
    head = head_of_program(codebook)
    codebook, embed_sum = codes_of_head(codebook, head), codes_of_head(embed_sum, head)
    statistics, cluster_size = codes_of_head(statistics, head), codes_of_head(cluster_size, head)
    num_codes = codebook.num_codes
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    count = _load_counts(statistics, k)
    size = tl.load(cluster_size.tensor + code_offsets(cluster_size, k), mask=k < num_codes, other=1.0)
    total = tl.load(total_ptr + head)
    smoothed = (size + epsilon) / (total + num_codes * epsilon) * total
    new = _lerp(load_codes(embed_sum, k, d), load_codes(statistics, k, d), weight)
    store_codes(embed_sum, new, k, d)
    # A code without vectors stays where it is; smoothing would move it towards the origin at each step.
    is_used = (count > 0) & (size > 0)
    store_codes(codebook, new / tl.where(is_used, smoothed, 1.0)[:, None], tl.where(is_used, k, num_codes), d)


def ema_statistics(x: Tensor, indices: Tensor, num_codes: int, num_heads: int) -> Tensor:
    codes_of_all = num_heads * num_codes
    if x.numel() == 0:
        return torch.zeros(codes_of_all, x.shape[-1] + 1, dtype=torch.float32, device=x.device)
    rows = as_rows(x, num_heads)
    codes = torch.empty(rows.num_vectors, dtype=torch.int64, device=x.device)
    with on_device(x):
        _finite_codes_kernel[(triton.cdiv(rows.num_vectors // num_heads, 64), 1, num_heads)](
            rows, indices.contiguous(), codes, num_codes, num_heads, BLOCK_N=64, BLOCK_D=64
        )
    if suits(rows, codes_of_all):
        # The offsets of rows of heads would spill registers: a map with heads is copied.
        return one_hot_sum(as_rows(x), codes, codes_of_all)
    return segment_sum(rows, codes, codes_of_all)


def ema_step(
    codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, statistics: Tensor, decay: float, epsilon: float
) -> None:
    codes, num_features = as_codes(codebook), codebook.shape[-1]
    # Sizes are codes of one feature, and counts the feature after those of the sums.
    sizes, batch = as_codes(cluster_size.unsqueeze(-1)), as_codes(statistics)._replace(num_features=num_features)
    total = torch.empty(codes.heads, dtype=torch.float32, device=codebook.device)
    grid = (triton.cdiv(codes.num_codes, 32), triton.cdiv(num_features, 64), codes.heads)
    block_k = min(4096, triton.next_power_of_2(codes.num_codes))
    with on_device(codebook):
        _cluster_sizes_kernel[1, 1, codes.heads](sizes, batch, total, 1 - decay, BLOCK_K=block_k, num_warps=8)
        _ema_step_kernel[grid](
            codes,
            sizes,
            as_codes(embed_sum),
            batch,
            total,
            1 - decay,
            epsilon,
            BLOCK_K=32,
            BLOCK_D=64,
        )
    # Autograd does not see what a kernel writes.
    torch.autograd.graph.increment_version((codebook, cluster_size, embed_sum))

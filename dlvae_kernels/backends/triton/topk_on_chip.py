"""The k best of few codes: all scores of a block of rows in registers, of which the k-th largest is the threshold.

score = x . c - |c|^2 / 2, or x . c + b, by products of float16 parts as in `search`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .codebook_parts import NEVER, codebook_parts, codebook_shift, own_shift, power_of_two, split
from .ordered import from_ordered, kth_largest, to_ordered
from .rows import Rows, load_rows
from .topk_rank import rank, sort_found
from .tuning import INTERPRETED, on_chip_config


@triton.jit
def _product(x, c, acc, UPCAST: tl.constexpr):
    """acc + x c^T, equal for equal codes, as on matrix units; NumPy's product in the interpreter is not."""
    if UPCAST:
        return acc + tl.sum(x.to(tl.float32)[:, :, None] * c.to(tl.float32).T[None, :, :], axis=1)
    return tl.dot(x, c.T, acc=acc)


@triton.jit
def _select_kernel(
    x,
    high_parts,
    low_parts,
    bias_ptr,
    norm_ptr,
    meta_ptr,
    index_ptr,
    value_ptr,
    square_ptr,
    worklist_ptr,
    count_ptr,
    kept,
    DOT: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The k best codes of each row in the order of their indices, with distance or value; other rows on a worklist."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    features = tl.arange(0, BLOCK_D)
    is_open = tl.max((tl.load(norm_ptr + columns) == float("inf")).to(tl.int32), axis=0)
    largest = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, PADDED, BLOCK_D):
        y = load_rows(x, n, d + features).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(y), axis=1))
        squares += tl.sum(y * y, axis=1)
    shift = own_shift(largest)
    scale = power_of_two(shift)[:, None]
    score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for d in tl.range(0, x.num_features, BLOCK_D, num_stages=STAGES):
        y = load_rows(x, n, d + features)
        high = high_parts.load([0, d])
        if SPLIT:
            y, y_low = split(y.to(tl.float32), scale)
            low = low_parts.load([0, d])
            score = _product(y_low, high, score, UPCAST)
            score = _product(y, low, score, UPCAST)
        score = _product(y, high, score, UPCAST)
    if SPLIT:
        score = score * power_of_two(-shift)[:, None] * power_of_two(-codebook_shift(meta_ptr))
    score += tl.load(bias_ptr + columns)[None, :]
    ordered = to_ordered(score)
    threshold, reached = kth_largest(ordered, kept)
    # Of those that tie at the threshold the first: up to this column.
    last = tl.full([BLOCK_N], BLOCK_K - 1, tl.int32)
    if tl.max(reached, axis=0) > kept:
        wanted = kept - tl.sum((ordered > threshold[:, None]).to(tl.int32), axis=1)
        least = tl.zeros([BLOCK_N], tl.int32)
        while tl.max(last - least, axis=0) > 0:
            middle = (least + last) // 2
            is_before = (ordered == threshold[:, None]) & (columns[None, :] <= middle[:, None])
            is_enough = tl.sum(is_before.to(tl.int32), axis=1) >= wanted
            last = tl.where(is_enough, middle, last)
            least = tl.where(is_enough, least, middle + 1)
    is_taken = (ordered > threshold[:, None]) | ((ordered == threshold[:, None]) & (columns[None, :] <= last[:, None]))
    places = tl.cumsum(is_taken.to(tl.int32), axis=1) - 1
    mask = is_taken & (n < x.num_rows)[:, None]
    out = tl.arange(0, BLOCK_N)[:, None] * kept + places
    start = first.to(tl.int64) * kept
    value = from_ordered(ordered)
    if not DOT:
        value = squares[:, None] - 2.0 * value
        tl.store(square_ptr + n, squares, mask=n < x.num_rows)
    tl.store(index_ptr + start + out, tl.broadcast_to(columns[None, :], [BLOCK_N, BLOCK_K]).to(tl.int64), mask=mask)
    tl.store(value_ptr + start + out, value, mask=mask)
    # What is not finite, or too long for a square, is left to differences.
    is_found = (from_ordered(threshold) > NEVER) & (squares < float("inf")) & (is_open == 0)
    is_lost = (is_found == 0) & (n < x.num_rows)
    place = tl.atomic_add(count_ptr + tl.zeros_like(n), 1, mask=is_lost, sem="relaxed")
    tl.store(worklist_ptr + place, n, mask=is_lost)


def topk_on_chip(
    rows: Rows, dictionary: Tensor, metric: str, bias: Tensor | None, indices: Tensor, values: Tensor
) -> None:
    """Write the k best codes of each row, [N, k] int64, and their distances or values, [N, k] float32."""
    x = rows.tensor
    num_codes, kept = len(dictionary), indices.shape[-1]
    splits_parts = dictionary.dtype != x.dtype or x.dtype == torch.float32
    dtype = torch.float16 if splits_parts else x.dtype
    config = on_chip_config(rows.num_features, num_codes)
    parts = codebook_parts(dictionary, config, dtype, splits_parts, metric, bias, scales_bias=False)
    squares = torch.empty(rows.num_rows, dtype=torch.float32, device=x.device)
    worklist = torch.empty(rows.num_rows, dtype=torch.int32, device=x.device)
    count = torch.zeros(1, dtype=torch.int32, device=x.device)
    block = [config.block_k, config.block_d]
    _select_kernel[(triton.cdiv(rows.num_rows, config.block_n),)](
        rows,
        TensorDescriptor.from_tensor(parts.high, block),
        TensorDescriptor.from_tensor(parts.low, block),
        parts.bias,
        parts.norms,
        parts.meta,
        indices,
        values,
        squares,
        worklist,
        count,
        kept,
        DOT=metric == "dot",
        SPLIT=splits_parts,
        UPCAST=INTERPRETED,
        PADDED=config.padded(rows.num_features),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        maxnreg=255,
    )
    sort_found(rows, dictionary, metric, squares, indices, values)
    rank(rows, dictionary, metric, bias, parts.meta, indices, values, worklist=worklist, count=count)

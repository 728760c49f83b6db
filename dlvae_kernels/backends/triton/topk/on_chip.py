"""The k best of few codes: all scores of a block of vectors are in registers, and a threshold selects the k largest.

The score is x . c - |c|^2 / 2 or x . c + bias, by products of float16 terms as in the search for the nearest code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..language.products import UPCAST
from ..language.rows import largest_and_squares, load_rows
from ..language.scaling import codebook_shift, power_of_two, split_terms, vector_shift
from ..search.codebook_terms import NEVER, codebook_terms
from .config import on_chip_config
from .ordered import from_ordered, kth_largest, to_ordered
from .rank import Inputs, rank, sort_selected


class Selected(NamedTuple):
    """The outputs of the kernel.

    indices, distances: [N, k] in the order of the indices; distances are values for inner products.
    squares: [N] |x|^2, or None for inner products.
    worklist, length: [N] and [1] int32, vectors whose scores do not decide, and their number; `rank` overwrites their
        results.
    """

    indices: Tensor
    distances: Tensor
    squares: Tensor | None
    worklist: Tensor
    length: Tensor


@triton.jit
def _product(x, c, total):
    """total + x c^T, with the same result for equal codes, which NumPy's product in the interpreter does not give."""
    if UPCAST:
        return total + tl.sum(x.to(tl.float32)[:, :, None] * c.to(tl.float32).T[None, :, :], axis=1)
    return tl.dot(x, c.T, acc=total)


@triton.jit
def _scores(
    x,
    n,
    high_terms,
    low_terms,
    bias_ptr,
    extremes_ptr,
    largest,
    TWO_TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The scores of vectors n for all codes, [BLOCK_N, BLOCK_K] float32."""
    shift = vector_shift(largest)
    score = tl.zeros([n.shape[0], BLOCK_K], tl.float32)
    for begin in tl.range(0, x.num_features, BLOCK_D, num_stages=STAGES):
        high = load_rows(x, n, begin + tl.arange(0, BLOCK_D))
        c_high = high_terms.load([0, begin])
        if TWO_TERMS:
            high, low = split_terms(high.to(tl.float32), power_of_two(shift)[:, None])
            c_low = low_terms.load([0, begin])
            score = _product(low, c_high, score)
            score = _product(high, c_low, score)
        score = _product(high, c_high, score)
    if TWO_TERMS:
        score = score * power_of_two(-shift)[:, None] * power_of_two(-codebook_shift(extremes_ptr))
    return score + tl.load(bias_ptr + tl.arange(0, BLOCK_K))[None, :]


@triton.jit
def _last_tied_column(ordered, threshold, reached, num_selected):
    """The last selected column of each row among those that tie at the threshold; ties go to the first columns."""
    BLOCK_K: tl.constexpr = ordered.shape[1]
    columns = tl.arange(0, BLOCK_K)[None, :]
    last = tl.full([ordered.shape[0]], BLOCK_K - 1, tl.int32)
    if tl.max(reached, axis=0) > num_selected:
        wanted = num_selected - tl.sum((ordered > threshold[:, None]).to(tl.int32), axis=1)
        least = tl.zeros([ordered.shape[0]], tl.int32)
        while tl.max(last - least, axis=0) > 0:
            middle = (least + last) // 2
            is_before = (ordered == threshold[:, None]) & (columns <= middle[:, None])
            is_enough = tl.sum(is_before.to(tl.int32), axis=1) >= wanted
            last = tl.where(is_enough, middle, last)
            least = tl.where(is_enough, least, middle + 1)
    return last


@triton.jit
def _select_kernel(
    x,
    high_terms,
    low_terms,
    bias_ptr,
    norm_ptr,
    extremes_ptr,
    selected,
    num_selected,
    TWO_TERMS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the k best codes of each vector; a vector for which scores do not decide goes on the worklist."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    is_too_long = tl.max((tl.load(norm_ptr + columns) == float("inf")).to(tl.int32), axis=0)
    largest, squares = largest_and_squares(x, n, PADDED, BLOCK_D)
    ordered = to_ordered(
        _scores(x, n, high_terms, low_terms, bias_ptr, extremes_ptr, largest, TWO_TERMS, BLOCK_K, BLOCK_D, STAGES)
    )
    threshold, reached = kth_largest(ordered, num_selected)
    last = _last_tied_column(ordered, threshold, reached, num_selected)
    is_tied = (ordered == threshold[:, None]) & (columns[None, :] <= last[:, None])
    is_selected = (ordered > threshold[:, None]) | is_tied
    at = tl.arange(0, BLOCK_N)[:, None] * num_selected + tl.cumsum(is_selected.to(tl.int32), axis=1) - 1
    mask = is_selected & (n < x.num_vectors)[:, None]
    # The results of a block are contiguous: 32-bit offsets from their start save registers.
    start = first.to(tl.int64) * num_selected
    value = from_ordered(ordered)
    if selected.squares is not None:
        value = squares[:, None] - 2.0 * value
        tl.store(selected.squares + n, squares, mask=n < x.num_vectors)
    index = tl.broadcast_to(columns[None, :], [BLOCK_N, BLOCK_K]).to(tl.int64)
    tl.store(selected.indices + start + at, index, mask=mask)
    tl.store(selected.distances + start + at, value, mask=mask)
    # Where a score or a square is not finite, differences decide.
    is_decided = (from_ordered(threshold) > NEVER) & (squares < float("inf")) & (is_too_long == 0)
    is_lost = (is_decided == 0) & (n < x.num_vectors)
    place = tl.atomic_add(selected.length + tl.zeros_like(n), 1, mask=is_lost, sem="relaxed")
    tl.store(selected.worklist + place, n, mask=is_lost)


def topk_on_chip(inputs: Inputs, indices: Tensor, values: Tensor) -> None:
    """Write the k best codes of each vector, [N, k] int64, and their distances or values, [N, k] float32."""
    x, codes = inputs.x, inputs.codes
    device, dtype = x.tensor.device, x.tensor.dtype
    two_terms = codes.tensor.dtype != dtype or dtype == torch.float32
    config = on_chip_config(x.num_features, codes.num_codes)
    padded = config.padded(x.num_features)
    terms = codebook_terms(
        codes,
        padded=padded,
        block_k=config.block_k,
        dtype=torch.float16 if two_terms else dtype,
        two_terms=two_terms,
        scales_bias=False,
        metric="dot" if inputs.dot else "l2",
        bias=inputs.bias,
    )
    squares = None if inputs.dot else torch.empty(x.num_vectors, dtype=torch.float32, device=device)
    worklist = torch.empty(x.num_vectors, dtype=torch.int32, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    block = [config.block_k, config.block_d]
    _select_kernel[(triton.cdiv(x.num_vectors, config.block_n),)](
        x,
        TensorDescriptor.from_tensor(terms.high, block),
        TensorDescriptor.from_tensor(terms.low, block),
        terms.bias,
        terms.norms,
        terms.extremes,
        Selected(indices, values, squares, worklist, count),
        indices.shape[-1],
        TWO_TERMS=two_terms,
        PADDED=padded,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        maxnreg=255,
    )
    sort_selected(inputs, squares, indices, values)
    rank(inputs, terms.extremes, indices, values, count, worklist=worklist)

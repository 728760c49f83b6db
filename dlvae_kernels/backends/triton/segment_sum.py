"""Sums and counts of rows by code, in a fixed order: no atomics, so that equal inputs give equal bits.

Rows are sorted by code, and a program sums a chunk of sorted rows, as the product of a matrix that marks equal codes
with the rows: a code that begins and ends within its chunk is done. What crosses an edge of a chunk is kept apart, and
a second kernel joins those pieces in order, in float64: the error of a float32 chain grows with its length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .products import set_apart, sum_marked
from .rows import Rows, load_rows
from .tuning import INTERPRETED, on_device

_CHUNK = 64


@triton.jit
def _chunk_sum_kernel(
    rows,
    weight_ptr,
    order_ptr,
    code_ptr,
    out_ptr,
    edge_ptr,
    num_pairs,
    kept,
    TERMS: tl.constexpr,
    UPCAST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of the codes of a chunk, all its rows at once. edge: [chunks, 2, D + 1], pieces of its first and last."""
    num_features = rows.num_features
    chunk = tl.program_id(0).to(tl.int64)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_pair = place < num_pairs
    code = tl.load(code_ptr + place, mask=is_pair, other=-1)
    pair = tl.load(order_ptr + place, mask=is_pair, other=0)
    n = tl.where(is_pair, pair // kept, rows.num_rows)
    x = load_rows(rows, n, d).to(tl.float32)
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + pair, mask=is_pair, other=0.0).to(tl.float32)[:, None]
    is_same = code[:, None] == code[None, :]
    x, total = set_apart(is_same, x, tl.zeros([CHUNK, BLOCK_D], tl.float32))
    total = sum_marked(is_same, x, total, TERMS, UPCAST)
    count = tl.sum(is_same.to(tl.float32), axis=1)
    # The sum of a code is written where the code ends.
    before = tl.load(code_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    following = tl.load(code_ptr + place + 1, mask=place + 1 < num_pairs, other=-1)
    is_last = (place == chunk * CHUNK + CHUNK - 1) | (place == num_pairs - 1)
    ends = is_pair & ((code != following) | is_last)
    from_before = code == before
    is_piece = from_before | (code == following)
    # The piece that came from before goes to slot 0, one that only goes on to slot 1.
    width = num_features + 1
    whole = out_ptr + code.to(tl.int64) * width
    piece = edge_ptr + (chunk * 2 + tl.where(from_before, 0, 1)) * width
    is_whole = ends & (is_piece == 0)
    is_piece = ends & is_piece
    inside = (d < num_features)[None, :]
    tl.store(whole[:, None] + d[None, :], total, mask=is_whole[:, None] & inside)
    tl.store(piece[:, None] + d[None, :], total, mask=is_piece[:, None] & inside)
    counts = tl.program_id(1) == 0
    tl.store(whole + num_features, count, mask=is_whole & counts)
    tl.store(piece + num_features, count, mask=is_piece & counts)


@triton.jit
def _join_edges_kernel(
    code_ptr,
    out_ptr,
    edge_ptr,
    num_pairs,
    num_features,
    num_chunks,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For a code that begins in this chunk and crosses its end: its piece here and those of the chunks that follow."""
    chunk = tl.program_id(0).to(tl.int64)
    last = tl.minimum(chunk * CHUNK + CHUNK, num_pairs) - 1
    code = tl.load(code_ptr + last)
    goes_on = tl.load(code_ptr + last + 1, mask=last + 1 < num_pairs, other=-1) == code
    begins_before = tl.load(code_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1) == code
    if goes_on & (begins_before == 0):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = d <= num_features
        width = num_features + 1
        total = tl.load(edge_ptr + (chunk * 2 + 1) * width + d, mask=mask, other=0.0).to(tl.float64)
        following = chunk + 1
        while following < num_chunks:
            ahead = following + tl.arange(0, AHEAD)
            is_same = tl.load(code_ptr + ahead * CHUNK, mask=ahead < num_chunks, other=-1) == code
            pieces = edge_ptr + (ahead * 2 * width)[:, None] + d[None, :]
            piece = tl.sum(tl.load(pieces, mask=is_same[:, None] & mask[None, :], other=0.0), axis=0)
            total += piece.to(tl.float64)
            following = tl.where(tl.min(is_same.to(tl.int32), axis=0) > 0, following + AHEAD, num_chunks)
        tl.store(out_ptr + code.to(tl.int64) * width + d, total.to(tl.float32), mask=mask)


def valid_or_last(indices: Tensor, num_codes: int) -> Tensor:
    """Indices as `segment_sum` takes them: flat, and K for those out of [0, K)."""
    codes = indices.flatten()
    return torch.where((codes >= 0) & (codes < num_codes), codes, num_codes)


def segment_sum(rows: Rows, codes: Tensor, num_codes: int, weights: Tensor | None = None) -> Tensor:
    """Sums and numbers [K, D + 1] float32 of rows by their codes; rows of code K are left out.

    Args:
        codes: [N * k], k of each row.
        weights: [N * k] contiguous, times which a row counts in a sum; None: 1.
    """
    x, width = rows.tensor, rows.num_features + 1
    # Code K comes last; out has a row for it that is cut off.
    out = torch.zeros(num_codes + 1, width, dtype=torch.float32, device=x.device)
    if codes.numel() == 0:
        return out[:num_codes]
    # Fewer bits sort faster; K itself is a code.
    smallest = next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if num_codes <= torch.iinfo(dtype).max)
    ordered, order = torch.sort(codes.to(smallest), stable=True)
    pairs = codes.numel()
    chunks = triton.cdiv(pairs, _CHUNK)
    edge = torch.empty(chunks, 2, width, dtype=torch.float32, device=x.device)
    block = min(64, max(16, triton.next_power_of_2(rows.num_features)))
    with on_device(x):
        _chunk_sum_kernel[chunks, triton.cdiv(rows.num_features, block)](
            rows,
            weights,
            order,
            ordered,
            out,
            edge,
            pairs,
            pairs // rows.num_rows,
            TERMS={torch.bfloat16: 1, torch.float16: 2}.get(x.dtype, 3) if weights is None else 3,
            UPCAST=INTERPRETED,
            CHUNK=_CHUNK,
            BLOCK_D=block,
            num_warps=8,
        )
        _join_edges_kernel[chunks, triton.cdiv(width, block)](
            ordered, out, edge, pairs, rows.num_features, chunks, CHUNK=_CHUNK, AHEAD=16, BLOCK_D=block
        )
    return out[:num_codes]

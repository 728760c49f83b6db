"""Sums and counts of rows by code, in a fixed order: no atomics, so that equal inputs give equal bits.

Rows are sorted by code, and a program sums a chunk of sorted rows: a code that begins and ends within its chunk is
done. What crosses an edge of a chunk is kept apart, and a second kernel joins those pieces in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Rows, row_offsets
from .tuning import on_device

_CHUNK = 64


@triton.jit
def _chunk_sum_kernel(
    x_ptr,
    weight_ptr,
    order_ptr,
    code_ptr,
    out_ptr,
    edge_ptr,
    num_pairs,
    num_features,
    kept,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of the codes of a chunk, one row after the other. edge: [chunks, 2, D + 1], pieces of its first and last."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, num_pairs)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    width = num_features + 1
    inside = d < width
    total = tl.zeros([BLOCK_D], tl.float32)
    from_before = (tl.load(code_ptr + begin - 1, mask=begin > 0, other=-1) == tl.load(code_ptr + begin)).to(tl.int32)
    for place in range(begin, end):
        code = tl.load(code_ptr + place)
        following = tl.load(code_ptr + place + 1, mask=place + 1 < num_pairs, other=-1)
        pair = tl.load(order_ptr + place)
        offset = row_offsets(pair // kept, inner, stride_outer, stride_inner)
        x = tl.load(x_ptr + offset + d.to(tl.int64) * stride_d, mask=d < num_features, other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(weight_ptr + pair).to(tl.float32)
        # The last column counts.
        total += tl.where(d == num_features, 1.0, x)
        is_last = place == end - 1
        ends = (code != following) | is_last
        goes_on = is_last & (code == following)
        whole = out_ptr + code * width + d
        # The piece that came from before goes to slot 0, one that only goes on to slot 1.
        piece = edge_ptr + (chunk * 2 + 1 - from_before) * width + d
        is_piece = (from_before > 0) | goes_on
        tl.store(whole, total, mask=inside & ends & (is_piece == 0))
        tl.store(piece, total, mask=inside & ends & is_piece)
        total = tl.where(ends, 0.0, total)
        from_before = tl.where(ends, 0, from_before)


@triton.jit
def _join_edges_kernel(
    code_ptr, out_ptr, edge_ptr, num_pairs, num_features, num_chunks, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """For a code that begins in this chunk and crosses its end: its piece here and those of the chunks that follow."""
    chunk = tl.program_id(0).to(tl.int64)
    last = tl.minimum(chunk * CHUNK + CHUNK, num_pairs) - 1
    code = tl.load(code_ptr + last)
    goes_on = tl.load(code_ptr + last + 1, mask=last + 1 < num_pairs, other=-1) == code
    begins_before = (tl.load(code_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1) == code) & (
        tl.load(code_ptr + chunk * CHUNK) == code
    )
    if goes_on & (begins_before == 0):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = d <= num_features
        width = num_features + 1
        total = tl.load(edge_ptr + (chunk * 2 + 1) * width + d, mask=mask, other=0.0)
        following = chunk + 1
        while following < num_chunks:
            if tl.load(code_ptr + following * CHUNK) == code:
                total += tl.load(edge_ptr + following * 2 * width + d, mask=mask, other=0.0)
                following += 1
            else:
                following = tl.cast(num_chunks, tl.int64)
        tl.store(out_ptr + code.to(tl.int64) * width + d, total, mask=mask)


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
    ordered, order = torch.sort(codes, stable=True)
    pairs = codes.numel()
    chunks = triton.cdiv(pairs, _CHUNK)
    edge = torch.empty(chunks, 2, width, dtype=torch.float32, device=x.device)
    block = min(64, max(16, triton.next_power_of_2(width)))
    grid = (chunks, triton.cdiv(width, block))
    with on_device(x):
        _chunk_sum_kernel[grid](
            x,
            x if weights is None else weights,
            order,
            ordered,
            out,
            edge,
            pairs,
            rows.num_features,
            pairs // rows.num_rows,
            *rows.strides,
            WEIGHTED=weights is not None,
            CHUNK=_CHUNK,
            BLOCK_D=block,
        )
        _join_edges_kernel[grid](ordered, out, edge, pairs, rows.num_features, chunks, CHUNK=_CHUNK, BLOCK_D=block)
    return out[:num_codes]

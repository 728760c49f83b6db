"""Sums and counts of vectors by code in a fixed order: no atomics, so that results are bitwise reproducible.

Vectors are sorted by code, and a program sums a chunk of sorted vectors, as the product of the matrix of equal codes
with the vectors. A code that begins and ends within its chunk is done. Where a code crosses an edge of a chunk, each
chunk writes its piece, and a second kernel joins the pieces in order, in float64 (docs/numerics.md, section 9.1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import on_device
from ..language.products import replace_non_finite, sum_marked
from ..language.rows import Rows, load_rows
from .flat_codes import code_dtype

CHUNK = 64


@triton.jit
def _chunk_sum_kernel(
    x,
    weight_ptr,
    order_ptr,
    code_ptr,
    out_ptr,
    edge_ptr,
    num_pairs,
    num_selected,
    TERMS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the sums and counts of the codes of a chunk to out [K + 1, D + 1] or edge [chunks, 2, D + 1].

    edge: the piece of the code that began in an earlier chunk, and the piece of the code that continues in the next.
    """
    width = x.num_features + 1
    chunk = tl.program_id(0).to(tl.int64)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_pair = place < num_pairs
    code = tl.load(code_ptr + place, mask=is_pair, other=-1)
    pair = tl.load(order_ptr + place, mask=is_pair, other=0)
    y = load_rows(x, tl.where(is_pair, pair // num_selected, x.num_vectors), d).to(tl.float32)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + pair, mask=is_pair, other=0.0).to(tl.float32)[:, None]
    is_same = code[:, None] == code[None, :]
    y, total = replace_non_finite(is_same, y, tl.zeros([CHUNK, BLOCK_D], tl.float32))
    total = sum_marked(is_same, y, total, TERMS)
    count = tl.sum(is_same.to(tl.float32), axis=1)
    # The sum of a code is written where the code ends.
    before = tl.load(code_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    following = tl.load(code_ptr + place + 1, mask=place + 1 < num_pairs, other=-1)
    is_last = (place == chunk * CHUNK + CHUNK - 1) | (place == num_pairs - 1)
    ends = is_pair & ((code != following) | is_last)
    began_before = code == before
    is_piece = began_before | (code == following)
    whole = out_ptr + code.to(tl.int64) * width
    piece = edge_ptr + (chunk * 2 + tl.where(began_before, 0, 1)) * width
    is_whole = ends & (is_piece == 0)
    is_piece = ends & is_piece
    inside = (d < x.num_features)[None, :]
    tl.store(whole[:, None] + d[None, :], total, mask=is_whole[:, None] & inside)
    tl.store(piece[:, None] + d[None, :], total, mask=is_piece[:, None] & inside)
    counts = tl.program_id(1) == 0
    tl.store(whole + x.num_features, count, mask=is_whole & counts)
    tl.store(piece + x.num_features, count, mask=is_piece & counts)


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
    """Write the sum of the pieces of the code that begins in this chunk and crosses its end, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    last = tl.minimum(chunk * CHUNK + CHUNK, num_pairs) - 1
    code = tl.load(code_ptr + last)
    continues = tl.load(code_ptr + last + 1, mask=last + 1 < num_pairs, other=-1) == code
    began_before = tl.load(code_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1) == code
    if continues & (began_before == 0):
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


def segment_sum(x: Rows, codes: Tensor, num_codes: int, weights: Tensor | None = None) -> Tensor:
    """The sums and counts [K, D + 1] float32 of vectors by their codes; vectors assigned to K (no code) are left out.

    Args:
        codes: [N * k], the assignments of the vectors, k for each, as `flat_codes` gives them.
        weights: [N * k] contiguous, the factors of the vectors in the sums, or None for 1.
    """
    width, device = x.num_features + 1, x.tensor.device
    # The sums of code K are cut off.
    out = torch.zeros(num_codes + 1, width, dtype=torch.float32, device=device)
    num_pairs = codes.numel()
    if num_pairs == 0:
        return out[:num_codes]
    sorted_codes, order = torch.sort(codes.to(code_dtype(num_codes)), stable=True)
    chunks = triton.cdiv(num_pairs, CHUNK)
    edge = torch.empty(chunks, 2, width, dtype=torch.float32, device=device)
    block_d = min(64, max(16, triton.next_power_of_2(x.num_features)))
    with on_device(x.tensor):
        _chunk_sum_kernel[chunks, triton.cdiv(x.num_features, block_d)](
            x,
            weights,
            order,
            sorted_codes,
            out,
            edge,
            num_pairs,
            num_pairs // x.num_vectors,
            TERMS={torch.bfloat16: 1, torch.float16: 2}.get(x.tensor.dtype, 3) if weights is None else 3,
            CHUNK=CHUNK,
            BLOCK_D=block_d,
            num_warps=8,
        )
        _join_edges_kernel[chunks, triton.cdiv(width, block_d)](
            sorted_codes, out, edge, num_pairs, x.num_features, chunks, CHUNK=CHUNK, AHEAD=16, BLOCK_D=block_d
        )
    return out[:num_codes]

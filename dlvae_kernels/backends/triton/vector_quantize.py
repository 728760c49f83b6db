"""Triton `vector_quantize`: the search in `search/`.

Its kernel also writes the codes if K is not partitioned and no certificate is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architectures import on_device
from .language.rows import (
    Rows,
    as_rows,
    empty_like_rows,
    head_of_program,
    heads_of,
    laid_out_like,
    load_rows,
    offset_of_head,
    store_rows,
    vectors_of_head,
)
from .search.launch import search
from .search.quantize_rows import Quantized
from .sums.flat_codes import flat_codes
from .sums.segment_sum import segment_sum

_BLOCK_N, _BLOCK_D = 64, 64


@triton.jit
def _vector_quantize_bwd_kernel(
    grad, half, index_ptr, out, weight_ptr, slope, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write grad - half * slope * weight, where weight is the gradient of the commitment loss, and 0 without a code."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = head_of_program(out)
    place = vectors_of_head(out, head, n)
    if out.num_heads is not None:
        grad = Rows(grad.tensor + offset_of_head(grad, head), grad.num_vectors // grad.num_heads, *grad[2:8])
        half = Rows(half.tensor + offset_of_head(half, head), half.num_vectors // half.num_heads, *half[2:8])
        out = Rows(out.tensor + offset_of_head(out, head), out.num_vectors // out.num_heads, *out[2:8])
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    error = load_rows(half, n, d).to(tl.float32) * slope * tl.load(weight_ptr).to(tl.float32)
    index = tl.load(index_ptr + place, mask=n < out.num_vectors, other=-1)
    value = tl.where((index >= 0)[:, None], load_rows(grad, n, d).to(tl.float32) - error, 0.0)
    store_rows(out, value, n, d)


def vector_quantize_fwd(
    x: Tensor, codebook: Tensor, need_error: bool, precision: str, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    counts = torch.zeros(codebook.shape[:-1], dtype=torch.int64, device=x.device)
    distances = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    heads = heads_of(codebook)
    rows = as_rows(x, heads)
    quantized = empty_like_rows(rows.tensor, heads)
    half_error = torch.empty_like(quantized) if need_error else x.new_empty(0)
    if x.numel() > 0:
        valid = mask if mask is None else mask.contiguous()
        out = Quantized(as_rows(quantized, heads), half_error if need_error else None, counts, valid)
        search(rows, codebook, precision, indices, distances, out)
    # The distances are already divided by D. The number of valid vectors stays on the device.
    num_valid = max(1, rows.num_vectors) if mask is None else counts.sum().clamp(min=1)
    loss = (distances.sum(dtype=torch.float64) / num_valid).to(torch.float32)
    # A channel-first map comes back channel-first.
    quantized, half_error = laid_out_like(x, quantized), laid_out_like(x, half_error) if need_error else half_error
    return quantized, indices, loss, loss.clone(), counts, half_error


def vector_quantize_bwd(
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    half_error: Tensor,
    indices: Tensor,
    num_codes: int,
    num_heads: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    # Each loss is the mean of (quantized - x)^2 = (2 half_error)^2, whose gradient is 4 half_error / numel.
    slope = 4 / max(1, half_error.numel())
    empty = torch.empty(0, dtype=torch.float32, device=half_error.device)
    grad_x = grad_codebook = empty
    if need_codebook:
        codes = flat_codes(indices, num_codes, num_heads)
        total = segment_sum(as_rows(half_error, num_heads), codes, num_heads * num_codes)[:, :-1]
        grad_codebook = total * (slope * grad_codebook_loss)
    if need_x:
        rows = as_rows(half_error, num_heads)
        grad_x = empty_like_rows(rows.tensor, num_heads)
        if half_error.numel() > 0:
            blocks = triton.cdiv(rows.num_vectors // num_heads, _BLOCK_N)
            grid = (blocks, triton.cdiv(rows.num_features, _BLOCK_D), num_heads)
            with on_device(half_error):
                _vector_quantize_bwd_kernel[grid](
                    as_rows(grad_quantized, num_heads),
                    rows,
                    indices.contiguous(),
                    as_rows(grad_x, num_heads),
                    grad_commitment_loss,
                    slope,
                    BLOCK_N=_BLOCK_N,
                    BLOCK_D=_BLOCK_D,
                )
        grad_x = laid_out_like(half_error, grad_x)
    return grad_x, grad_codebook

"""Triton `vector_quantize`: the search in `search/`.

Its kernel also writes the codes if K is not partitioned and no certificate is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architectures import on_device
from .language.rows import as_rows, empty_like_rows, laid_out_like, load_rows, store_rows
from .search.launch import search
from .search.quantize_rows import Quantized
from .sums.segment_sum import segment_sum, valid_or_last

_BLOCK_N, _BLOCK_D = 64, 64


@triton.jit
def _vector_quantize_bwd_kernel(grad, half_error, out, weight_ptr, slope, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write grad - half_error * slope * weight, where weight is the gradient of the commitment loss."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    error = load_rows(half_error, n, d).to(tl.float32) * slope * tl.load(weight_ptr).to(tl.float32)
    store_rows(out, load_rows(grad, n, d).to(tl.float32) - error, n, d)


def vector_quantize_fwd(
    x: Tensor, codebook: Tensor, need_error: bool, precision: str, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    counts = torch.zeros(len(codebook), dtype=torch.int64, device=x.device)
    distances = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows = as_rows(x)
    quantized = empty_like_rows(rows.tensor)
    half_error = torch.empty_like(quantized) if need_error else x.new_empty(0)
    if x.numel() > 0:
        out = Quantized(as_rows(quantized), half_error if need_error else None, counts)
        search(rows, codebook, precision, indices, distances, out)
    # The distances are already divided by D.
    loss = (distances.sum(dtype=torch.float64) / max(1, rows.num_vectors)).to(torch.float32)
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
    rows = as_rows(half_error)
    if need_codebook:
        total = segment_sum(rows, valid_or_last(indices, num_codes), num_codes)[:, :-1]
        grad_codebook = total * (slope * grad_codebook_loss)
    if need_x:
        grad_x = empty_like_rows(rows.tensor)
        if half_error.numel() > 0:
            grid = (triton.cdiv(rows.num_vectors, _BLOCK_N), triton.cdiv(rows.num_features, _BLOCK_D))
            with on_device(half_error):
                _vector_quantize_bwd_kernel[grid](
                    as_rows(grad_quantized),
                    rows,
                    as_rows(grad_x),
                    grad_commitment_loss,
                    slope,
                    BLOCK_N=_BLOCK_N,
                    BLOCK_D=_BLOCK_D,
                )
        grad_x = laid_out_like(half_error, grad_x)
    return grad_x, grad_codebook

"""Reference of `vector_quantize`: search, gather, both losses and the counts; and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .nearest_code import nearest_code
from .segment_sum import segment_sum


def vector_quantize_fwd(
    x: Tensor, codebook: Tensor, need_error: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    indices, _ = nearest_code(x, codebook, False, precision)
    codes = codebook[indices]  # [..., D]
    error = codes.to(torch.promote_types(x.dtype, torch.float32)) - x
    loss = error.square().sum() / max(1, x.numel())
    counts = torch.bincount(indices.flatten(), minlength=len(codebook))
    # empty_like keeps the strides of x: a channel-first map comes back channel-first.
    quantized = torch.empty_like(x).copy_(codes)
    saved = torch.empty_like(x).copy_(error) if need_error else x.new_empty(0)
    return quantized, indices, loss, loss.clone(), counts, saved


def vector_quantize_bwd(
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    error: Tensor,
    indices: Tensor,
    num_codes: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(error.dtype, torch.float32)
    # d mean((q - x)^2) / d q, before the factor of either loss.
    slope = error.to(dtype) * (2 / max(1, error.numel()))
    grad_x, grad_codebook = (torch.empty(0, dtype=dtype, device=error.device) for _ in range(2))
    if need_codebook:
        rows = (slope * grad_codebook_loss).reshape(-1, error.shape[-1])  # [N, D]
        grad_codebook = segment_sum(rows, None, indices.flatten(), num_codes, None)
    if need_x:
        grad_x = torch.empty_like(error).copy_(grad_quantized - slope * grad_commitment_loss)
    return grad_x, grad_codebook

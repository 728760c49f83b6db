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
    # The sum of squares may overflow float32 where the mean does not, so it is computed in float64.
    squares = torch.linalg.vector_norm(error, dtype=torch.float64).square()
    loss = (squares / max(1, x.numel())).to(error.dtype)
    counts = torch.bincount(indices.flatten(), minlength=len(codebook))
    # empty_like keeps the strides of x: a channels-first map stays channels-first.
    quantized = torch.empty_like(x).copy_(codes)
    # The difference of two float16 numbers may overflow float16; half of it does not.
    half_error = torch.empty_like(x).copy_(error / 2) if need_error else x.new_empty(0)
    return quantized, indices, loss, loss.clone(), counts, half_error


def vector_quantize_bwd(
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    half_error: Tensor,
    indices: Tensor,
    num_codes: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(half_error.dtype, torch.float32)
    # d mean((q - x)^2) / d q, before the factor of either loss.
    slope = half_error.to(dtype) * (4 / max(1, half_error.numel()))
    grad_x, grad_codebook = (torch.empty(0, dtype=dtype, device=half_error.device) for _ in range(2))
    if need_codebook:
        vectors = (slope * grad_codebook_loss).reshape(-1, half_error.shape[-1])  # [N, D]
        grad_codebook = segment_sum(vectors, None, indices.flatten(), num_codes, None)
    if need_x:
        grad_x = torch.empty_like(half_error).copy_(grad_quantized - slope * grad_commitment_loss)
    return grad_x, grad_codebook

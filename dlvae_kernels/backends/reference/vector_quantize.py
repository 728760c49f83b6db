"""Reference of `vector_quantize`: search, gather, both losses and the counts; and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .gather_codes import gather_codes_fwd
from .heads import codes_of_heads
from .nearest_code import nearest_code
from .segment_sum import segment_sum


def vector_quantize_fwd(
    x: Tensor, codebook: Tensor, need_error: bool, precision: str, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    indices, _ = nearest_code(x, codebook, False, precision)
    if mask is not None:
        indices = indices.masked_fill(~mask, -1)
    is_valid = indices >= 0
    codes = gather_codes_fwd(codebook, indices)  # [..., D]
    error = torch.where(is_valid[..., None], codes.to(torch.promote_types(x.dtype, torch.float32)) - x, 0)
    # The sum of squares may overflow float32 where the mean does not, so it is computed in float64.
    squares = torch.linalg.vector_norm(error, dtype=torch.float64).square()
    loss = (squares / (is_valid.sum() * x.shape[-1]).clamp(min=1)).to(error.dtype)
    numbers = codes_of_heads(indices, codebook.shape[-2], codebook.shape[:-2].numel())[is_valid.flatten()]
    counts = torch.bincount(numbers, minlength=codebook.shape[:-1].numel()).view(codebook.shape[:-1])
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
    num_heads: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(half_error.dtype, torch.float32)
    # d mean((q - x)^2) / d q, before the factor of either loss.
    slope = half_error.to(dtype) * (4 / max(1, half_error.numel()))
    grad_x, grad_codebook = (torch.empty(0, dtype=dtype, device=half_error.device) for _ in range(2))
    if need_codebook:
        vectors = (slope * grad_codebook_loss).reshape(-1, half_error.shape[-1])  # [N, D]
        codes = codes_of_heads(indices, num_codes, num_heads)
        grad_codebook = segment_sum(vectors, None, codes, num_heads * num_codes, None)
    if need_x:
        grad = (grad_quantized - slope * grad_commitment_loss).masked_fill(indices[..., None] < 0, 0)
        grad_x = torch.empty_like(half_error).copy_(grad)
    return grad_x, grad_codebook

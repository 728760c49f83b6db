"""Reference of `residual_quantize`: each level quantizes what the levels before it left; gradients and statistics.

The residual is defined in float32 (float64 for float64), one subtraction a level, so that all backends find the same
codes. The backward and the statistics compute it again from x and the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .nearest_code import nearest_code
from .rotation_trick import rotation_trick_bwd
from .segment_sum import segment_sum


def residual_quantize_fwd(
    x: Tensor, codebooks: Tensor, levels: Tensor | None, mask: Tensor | None, precision: str, gradient: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_levels, num_codes, _ = codebooks.shape
    residual = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))  # [N, D]
    valid = residual.new_ones(len(residual), dtype=torch.bool) if mask is None else mask.flatten()
    num_elements = (valid.sum() * x.shape[-1]).clamp(min=1)
    indices = torch.empty(len(residual), num_levels, dtype=torch.int64, device=x.device)
    losses = residual.new_empty(num_levels)
    counts = indices.new_empty(num_levels, num_codes)
    quantized = torch.zeros_like(residual)
    for level, codebook in enumerate(codebooks.to(residual.dtype)):
        runs = valid if levels is None else valid & levels[level]  # [N]
        found, _ = nearest_code(residual, codebook, False, precision)
        indices[:, level] = torch.where(runs, found, -1)
        codes = codebook[found]
        error = torch.where(runs[:, None], codes - residual, 0)
        # The sum of squares may overflow float32 where the mean does not, so it is computed in float64.
        losses[level] = torch.linalg.vector_norm(error, dtype=torch.float64).square() / num_elements
        counts[level] = torch.bincount(indices[:, level] + 1, minlength=num_codes + 1)[1:]
        residual = torch.where(runs[:, None], residual - codes, residual)
        quantized = torch.where(runs[:, None], quantized + codes, quantized)
    quantized = torch.empty_like(x).copy_(quantized.view(x.shape))
    return quantized, indices.view(*x.shape[:-1], num_levels), losses, losses.clone(), counts


class _Level(NamedTuple):
    """One level for the vectors that it quantized."""

    runs: Tensor  # bool [N, 1]: whether the vector has a code at this level
    codes: Tensor  # [N, D]: the code, or zeros
    residual: Tensor  # [N, D]: the vector that was quantized


def _levels(x: Tensor, indices: Tensor, codebooks: Tensor) -> Iterator[_Level]:
    """The levels of the forward again, from x and the indices of the codes."""
    residual = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    for codebook, index in zip(codebooks.to(residual.dtype), indices.reshape(-1, len(codebooks)).T, strict=True):
        runs = (index >= 0)[:, None]
        codes = torch.where(runs, codebook[index.clamp(min=0)], 0)
        yield _Level(runs, codes, residual)
        residual = residual - codes


def residual_quantize_bwd(
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    x: Tensor,
    indices: Tensor,
    codebooks: Tensor,
    gradient: str,
    need_x: bool,
    need_codebooks: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    vectors, grad = (tensor.reshape(-1, x.shape[-1]).to(dtype) for tensor in (x, grad_quantized))  # [N, D]
    grad_x, quantized = torch.zeros_like(vectors), torch.zeros_like(vectors)
    grad_codebooks = torch.zeros(codebooks.shape if need_codebooks else (0,), dtype=dtype, device=x.device)
    ran = torch.zeros(len(vectors), 1, dtype=torch.bool, device=x.device)
    slope = 2 / max(1, x.numel())
    for level, (runs, codes, residual) in enumerate(_levels(x, indices, codebooks)):
        error = torch.where(runs, codes - residual, 0) * slope  # half of the gradients of both losses, up to their sign
        if need_codebooks:
            which = runs.squeeze(1).nonzero().squeeze(1)
            sums = error * grad_codebook_loss[level]
            chosen = indices.reshape(-1, len(codebooks))[which, level]
            grad_codebooks[level] = segment_sum(sums, which, chosen, codebooks.shape[1], None)
        grad_x -= error * grad_commitment_loss[level]
        if gradient == "each":
            grad_x += torch.where(runs, grad, 0)
        elif gradient == "rotation_each":
            grad_x += torch.where(runs, rotation_trick_bwd(grad, residual, codes), 0)
        quantized, ran = quantized + codes, ran | runs
    if gradient == "once":
        grad_x += torch.where(ran, grad, 0)
    elif gradient == "rotation":
        grad_x += torch.where(ran, rotation_trick_bwd(grad, vectors, quantized), 0)
    grad_x = torch.empty_like(x).copy_(grad_x.view(x.shape)) if need_x else vectors.new_empty(0)
    return grad_x, grad_codebooks


def residual_statistics(x: Tensor, indices: Tensor, codebooks: Tensor) -> Tensor:
    num_levels, num_codes, _ = codebooks.shape
    statistics = []
    for level, (runs, _, residual) in enumerate(_levels(x, indices, codebooks)):
        # A residual that is not finite would make the averages NaN or infinite for good.
        kept = (runs.squeeze(1) & residual.isfinite().all(1)).nonzero().squeeze(1)
        codes = indices.reshape(-1, num_levels)[kept, level]
        counts = torch.bincount(codes, minlength=num_codes)[:, None].to(residual.dtype)
        statistics.append(torch.cat([segment_sum(residual, kept, codes, num_codes, None), counts], 1))
    return torch.stack(statistics)

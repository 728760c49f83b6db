"""Triton `code_entropy`: the softmax of (2 x.c - |c|^2) / temperature over all codes, by tiles and never [N, K].

The forward pass computes sums of exp(logit - m) and their entropies (`softmax/log_sum_exp.py`), then the probabilities
again, summed over the vectors. With h the gradients of the entropies and g those of the means, divided by the number of
vectors, the gradient of a logit is p (g_k - sum of p g - h (log p + entropy)). Its products with codes and vectors are
sums over tiles (`softmax/entropy_sum.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language.rows import Rows, as_rows
from .softmax.entropy_sum import entropy_sum
from .softmax.log_sum_exp import entropy_sums
from .softmax.softmax_sum import weight_sum


def _logits_of(x: Tensor, codebook: Tensor, temperature: float, mask: Tensor | None) -> tuple[Rows, Rows, Tensor]:
    """Vectors, with zeros in place of those that do not count, weight and bias [K] of the logits."""
    codes = codebook.float()
    weight, bias = codes * (2 / temperature), codes.square().sum(1, dtype=torch.float64).div_(-temperature).float()
    vectors = x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)
    return as_rows(vectors), as_rows(weight), bias


def code_entropy_fwd(
    x: Tensor, codebook: Tensor, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, codes, bias = _logits_of(x, codebook, temperature, mask)
    largest, totals, entropies = entropy_sums(rows, codes, bias)
    if mask is not None:
        valid = mask.flatten()
        largest, totals = torch.where(valid, largest, 0), torch.where(valid, totals, torch.inf)
        entropies = torch.where(valid, entropies, 0)
    sums = weight_sum(codes, rows, bias, -largest, 1 / totals, bias_in_a=True)
    count = max(1, rows.num_vectors) if mask is None else mask.sum().clamp(min=1)
    shape = x.shape[:-1]
    return entropies.view(shape), torch.stack([largest, totals], dim=1).view(*shape, 2), sums / count


def code_entropy_bwd(
    grad_entropies: Tensor,
    grad_mean_probabilities: Tensor,
    x: Tensor,
    codebook: Tensor,
    sums: Tensor,
    entropies: Tensor,
    temperature: float,
    mask: Tensor | None,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    rows, codes, bias = _logits_of(x, codebook, temperature, mask)
    largest, totals = sums.view(-1, 2).unbind(1)  # [N]
    count = max(1, rows.num_vectors) if mask is None else mask.sum().clamp(min=1)
    slopes = (grad_mean_probabilities / count).contiguous()
    shift, scale, grads = -largest, 1 / totals, grad_entropies.flatten().contiguous()
    expected = weight_sum(rows, codes, shift, bias, slopes, bias_in_a=False) * scale
    # The gradient of a logit is p (slope_k + offset_n - grad_n (logit - m)); the scale of a masked vector is 0.
    offsets = torch.where(scale > 0, grads * (totals.log() - entropies.flatten()), 0) - expected
    grad_x, grad_codebook = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
    if need_x:
        grad_x, _ = entropy_sum(rows, codes, shift, bias, offsets, slopes, grads, scale, bias_in_a=False)
        grad_x = grad_x.view(x.shape)
    if need_codebook:
        products, weights = entropy_sum(codes, rows, bias, shift, slopes, offsets, grads, scale, bias_in_a=True)
        grad_codebook = (products - weights[:, None] * codebook.float()).mul_(2 / temperature)
    return grad_x, grad_codebook

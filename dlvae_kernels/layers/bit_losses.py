"""The entropy losses of codes of independent bits, over several codebooks and ranks, and means over valid vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.bit_entropy import bit_entropy
from .distributed import all_reduce_mean


def bit_entropies(logits: Tensor, mask: Tensor | None, sync: bool) -> tuple[Tensor, Tensor]:
    """The per-sample entropy and the batch entropy of bits, means over C codebooks, without an N x 2^d matrix.

    Args:
        logits: [..., C, d] float32 or float64, the logarithm of the odds that a bit is one.
        mask: [...] bool, True for a valid vector; the entropies are 0 if there is none.
        sync: average the distribution of the batch entropy over the vectors of all ranks.
    Raises:
        ValueError: d is above 24.
    """
    found = [bit_entropy(each, mask) for each in logits.unbind(-2)]
    per_sample = mean_of_valid(torch.stack([each.entropies for each in found]).mean(0), mask)
    probabilities = torch.stack([each.mean_probabilities for each in found])
    count = logits[..., 0, 0].numel() if mask is None else mask.sum()
    probabilities = all_reduce_mean(probabilities, count, sync)
    # The gradient of p log p is infinite at 0.
    logarithms = probabilities.clamp(min=torch.finfo(logits.dtype).tiny).log()
    return per_sample, -(probabilities * logarithms).sum(1).mean()


def mean_of_valid(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over valid vectors, 0 if there is none; values of masked vectors are finite."""
    if mask is None:
        return values.sum() / max(1, values.numel())
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)

"""Losses that keep the codes of `VectorQuantize` apart and in use."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layers.projection import to_unit_length


def orthogonal_loss(codebooks: Tensor, indices: Tensor | None, max_codes: int | None) -> Tensor:
    """The mean square of the cosines of all pairs of codes, less that of a code with itself.

    Args:
        codebooks: [H, K, D].
        indices: count only these codes; None for all.
        max_codes: the most codes to count, selected at random.

    No K x K matrix: the squares of the elements of E E^T and E^T E have the same sum.

    Source: Shin et al. 2021, arXiv:2112.00384, eq. 2.
    """
    num_codes = codebooks.shape[1]
    limit = num_codes if max_codes is None else min(max_codes, num_codes)
    if indices is not None:
        is_used = torch.zeros(num_codes + 1, device=codebooks.device).index_fill_(0, indices.flatten(), 1)[:-1]
        # Random numbers order the used codes before the others.
        order = (is_used + torch.rand_like(is_used)).topk(limit).indices
        weight = is_used[order]
        codebooks = codebooks[:, order] * weight[:, None]
        count = weight.sum()
    else:
        if limit < num_codes:
            codebooks = codebooks[:, torch.randperm(num_codes, device=codebooks.device)[:limit]]
        count = torch.tensor(float(limit), device=codebooks.device)
    unit = to_unit_length(codebooks)
    squares = (unit.mT @ unit).square().sum()
    # Without any code it is 0.
    least = count.clamp(min=1)
    return squares / (len(codebooks) * least.square()) - count / least.square()


def diversity_loss(similarities: Tensor, is_valid: Tensor, temperature: float) -> Tensor:
    """Minus the entropy of the mean softmax over b and heads, averaged over the positions n that have valid vectors.

    Args:
        similarities: [b, n, heads, K].
        is_valid: [b, n, heads] bool.
    """
    is_valid = is_valid[..., None]
    probabilities = (similarities * temperature).softmax(-1)
    count = is_valid.sum((0, 2))
    mean = (probabilities * is_valid).sum((0, 2)) / count.clamp(min=1)
    return (mean * mean.clamp(min=1e-5).log()).sum() / (count > 0).sum().clamp(min=1)

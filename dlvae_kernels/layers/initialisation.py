"""Initial codes from the vectors of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .kmeans import lloyd

_KMEANS_ITERATIONS = 10


def codes_from(sampled: Tensor, vectors: Tensor, kmeans: bool, sync: bool, mask: Tensor | None = None) -> Tensor:
    """Initial codes [K, D] or [H, K, D] from sampled vectors of all ranks, and optionally the k-means that they start.

    Args:
        sampled: the sum over the ranks of `sample_vectors`, [K, D + 1] or [H, K, D + 1].
        vectors: this rank's vectors, [..., D] or [..., H, D].
    """
    num_codes = sampled.shape[-2]
    is_valid = sampled[..., -1] > 0
    valid_first = is_valid.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    # Valid vectors are repeated if there are fewer than codes.
    place = torch.arange(num_codes, device=sampled.device) % is_valid.sum(-1, keepdim=True).clamp(min=1)
    codes = sampled.take_along_dim(valid_first.take_along_dim(place, -1)[..., None], -2)[..., :-1]
    if not kmeans:
        return codes
    if mask is not None:
        # A vector with NaN moves nothing.
        shape = (*mask.shape, *[1] * (vectors.ndim - mask.ndim))
        vectors = torch.where(mask.view(shape), vectors, torch.nan)
    if codes.ndim == 2:
        return lloyd(vectors, codes, _KMEANS_ITERATIONS, sync=sync).centroids
    heads = zip(vectors.unbind(-2), codes, strict=True)
    return torch.stack([lloyd(part, each, _KMEANS_ITERATIONS, sync=sync).centroids for part, each in heads])

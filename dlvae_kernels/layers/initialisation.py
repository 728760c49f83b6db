"""Initial codes from the vectors of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.ema_update import ema_statistics
from .distributed import all_reduce_sum
from .kmeans import lloyd


def codes_from(
    sampled: Tensor, vectors: Tensor, iterations: int, unit_length: bool, sync: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Initial codes [K, D] or [H, K, D] from sampled vectors of all ranks, and their counts [K] or [H, K].

    Args:
        sampled: the sum over the ranks of `sample_vectors`, [K, D + 1] or [H, K, D + 1].
        vectors: this rank's vectors, [..., D] or [..., H, D].
        iterations: of the k-means that starts from the sampled vectors. With 0 these are the codes, with counts of 1.
        unit_length: the codes of k-means have length 1.
        mask: [...] bool without the heads: True for a valid vector.
    """
    num_codes = sampled.shape[-2]
    is_valid = sampled[..., -1] > 0
    valid_first = is_valid.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    # Valid vectors are repeated if there are fewer than codes.
    place = torch.arange(num_codes, device=sampled.device) % is_valid.sum(-1, keepdim=True).clamp(min=1)
    codes = sampled.take_along_dim(valid_first.take_along_dim(place, -1)[..., None], -2)[..., :-1]
    if iterations == 0:
        return codes, torch.ones_like(codes[..., 0])
    if mask is not None:
        # A vector with NaN moves nothing.
        shape = (*mask.shape, *[1] * (vectors.ndim - mask.ndim))
        vectors = torch.where(mask.view(shape), vectors, torch.nan)
    if codes.ndim == 2:
        return _clusters(vectors, codes, iterations, unit_length, sync)
    heads = zip(vectors.unbind(-2), codes, strict=True)
    found = [_clusters(part, each, iterations, unit_length, sync) for part, each in heads]
    return torch.stack([codes for codes, _ in found]), torch.stack([counts for _, counts in found])


def _clusters(vectors: Tensor, codes: Tensor, iterations: int, unit_length: bool, sync: bool) -> tuple[Tensor, Tensor]:
    """The centroids of k-means from `codes`, and the number of vectors of each."""
    centroids, indices, *_ = lloyd(vectors, codes, iterations, sync=sync, unit_length=unit_length)
    return centroids, all_reduce_sum(ema_statistics(vectors, indices, len(codes))[:, -1], sync)

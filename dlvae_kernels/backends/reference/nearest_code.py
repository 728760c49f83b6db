"""Reference of `nearest_code`: argmin_k |x - c_k|^2, in chunks of vectors, in float64; `precision` is ignored."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import distance_scores


def nearest_code(x: Tensor, codebook: Tensor, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    if codebook.ndim == 3:
        heads = [
            nearest_code(x[..., h, :], codes, return_distance, precision) for h, codes in enumerate(codebook.unbind())
        ]
        indices = torch.stack([each for each, _ in heads], -1)
        return indices, torch.stack([each for _, each in heads], -1) if return_distance else heads[0][1]
    vectors = x.reshape(-1, x.shape[-1])  # [N, D]
    num_distances = len(vectors) if return_distance else 0
    indices = torch.empty(len(vectors), dtype=torch.int64, device=x.device)
    distances = torch.empty(num_distances, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for scores in distance_scores(vectors, codebook):
        # argmin gives the first of equal keys: the lowest index.
        found = scores.keys.argmin(1, keepdim=True)
        indices[scores.positions] = found.squeeze(1)
        if return_distance:
            distances[scores.positions] = scores.values(found).squeeze(1).to(distances.dtype)
    shape = x.shape[:-1]
    return indices.view(shape), distances.view(shape if return_distance else (0,))

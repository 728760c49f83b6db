"""Reference of `topk_codes`: the k best codes of each vector, by (distance, index) or by (-product, index)."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import distance_scores, product_scores


def topk_codes(x: Tensor, dictionary: Tensor, k: int, metric: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    vectors = x.reshape(-1, x.shape[-1])  # [N, D]
    indices = torch.empty(len(vectors), k, dtype=torch.int64, device=x.device)
    values = torch.empty(len(vectors), k, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    search = distance_scores(vectors, dictionary) if metric == "l2" else product_scores(vectors, dictionary, bias)
    for scores in search:
        # topk orders equal keys arbitrarily; a vector with a tie among its k + 1 best codes is sorted stably instead.
        best, found = scores.keys.topk(min(k + 1, len(dictionary)), dim=1, largest=False)
        has_tie = (best[:, 1:] == best[:, :-1]).any(1)
        found = found[:, :k]
        found[has_tie] = scores.keys[has_tie].sort(dim=1, stable=True).indices[:, :k]
        indices[scores.positions] = found
        values[scores.positions] = scores.values(found).to(values.dtype)
    shape = (*x.shape[:-1], k)
    return indices.view(shape), values.view(shape)

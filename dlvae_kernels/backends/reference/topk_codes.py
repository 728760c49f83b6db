"""Reference of `topk_codes`: the k best codes of each row, by (distance, index) or by (-product, index)."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import Distances, Products, score_chunks


def topk_codes(x: Tensor, dictionary: Tensor, k: int, metric: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=x.device)
    values = torch.empty(len(rows), k, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for part, scores in score_chunks(rows, dictionary, Distances if metric == "l2" else Products, bias):
        # One more than k, to see whether a tie reaches over the edge of the selection.
        best, found = scores.values.topk(min(k + 1, len(dictionary)), dim=1, largest=False)
        tolerance = scores.tolerance(found)
        # Two infinite scores, those of NaN codes, tie too; their difference is not a number.
        has_tie = (~(best.diff(dim=1) > tolerance[:, :-1])).any(1)
        found = found[:, :k]
        threshold = best[:, k - 1 : k] + tolerance[:, k - 1 : k]
        found[has_tie] = scores.exact(has_tie, threshold).sort(dim=1, stable=True).indices[:, :k]
        indices[part] = found
        values[part] = scores.results(found, has_tie).to(values.dtype)
    shape = (*x.shape[:-1], k)
    return indices.view(shape), values.view(shape)

"""Reference of `topk_codes`: the k nearest codes of each row, ascending by (distance, index)."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import Codes


def topk_codes(x: Tensor, dictionary: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=x.device)
    distances = torch.empty(len(rows), k, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    codes = Codes(dictionary)
    for part, scores, row_norms in codes.chunks(rows):
        # One more than k, to see whether a tie reaches over the edge of the selection.
        best, found = scores.topk(min(k + 1, len(dictionary)), dim=1, largest=False)
        has_tie = _ties_with_next(codes, best, found, row_norms).any(1)
        chosen = found[:, :k]
        chosen[has_tie] = _sort_with_ties(codes, scores[has_tie], row_norms[has_tie])[:, :k]
        indices[part] = chosen
        # Ties share a distance, so the ascending scores fit the chosen order.
        distances[part] = codes.distances(best[:, :k], chosen, row_norms).to(distances.dtype)
    shape = (*x.shape[:-1], k)
    return indices.view(shape), distances.view(shape)


def _ties_with_next(codes: Codes, ascending: Tensor, order: Tensor, row_norms: Tensor) -> Tensor:
    """Whether each of the ascending scores [n, m] ties with its successor: [n, m - 1]."""
    gap = ascending.diff(dim=1)
    # The gap between two infinite scores, those of NaN codes, is not a number.
    return (gap <= codes.tie_tolerance(row_norms, order[:, :-1])) | gap.isnan()


def _sort_with_ties(codes: Codes, scores: Tensor, row_norms: Tensor) -> Tensor:
    """Order of each row of scores [n, K], in which scores that tie go by index."""
    ascending, order = scores.sort(dim=1)
    is_larger = ~_ties_with_next(codes, ascending, order, row_norms)
    group = torch.nn.functional.pad(is_larger.cumsum(1), (1, 0))  # [n, K], equal for scores that tie
    return order.gather(1, (group * scores.shape[1] + order).argsort(1))

"""Reference of `nearest_code`: argmin_k |x - c_k|^2, in chunks of rows; exact, whatever precision is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import score_chunks


def nearest_code(x: Tensor, codebook: Tensor, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    indices = torch.empty(len(rows), dtype=torch.int64, device=x.device)
    distances = torch.empty(
        len(rows) if return_distance else 0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
    )
    for part, scores in score_chunks(rows, codebook):
        best, found = scores.values.min(1, keepdim=True)
        threshold = best + scores.tolerance(found)
        has_tie = (scores.values <= threshold).sum(1) > 1
        # argmin gives the first of equal distances: the lowest index.
        found[has_tie] = scores.exact(has_tie, threshold).argmin(1, keepdim=True)
        indices[part] = found.squeeze(1)
        if return_distance:
            distances[part] = scores.results(found, has_tie).squeeze(1).to(distances.dtype)
    shape = x.shape[:-1]
    return indices.view(shape), distances.view(shape if return_distance else (0,))

"""Reference of `nearest_code`: argmin_k |x - c_k|^2, in chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import Codes


def nearest_code(x: Tensor, codebook: Tensor, return_distance: bool) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    indices = torch.empty(len(rows), dtype=torch.int64, device=x.device)
    distances = torch.empty(
        len(rows) if return_distance else 0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
    )
    codes = Codes(codebook)
    for part, scores, row_norms in codes.chunks(rows):
        best, found = scores.min(1, keepdim=True)
        threshold = best + codes.tie_tolerance(row_norms, found)
        # argmax of a 0/1 matrix is the first 1: the lowest of the tying indices.
        indices[part] = (scores <= threshold).to(torch.uint8).argmax(1)
        if return_distance:
            distances[part] = codes.distances(best, found, row_norms).squeeze(1).to(distances.dtype)
    shape = x.shape[:-1]
    return indices.view(shape), distances.view(shape if return_distance else (0,))

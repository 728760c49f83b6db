"""Reference of `nearest_code`: argmin_k |x - c_k|^2, in chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import Codes, squared_distances


def nearest_code(x: Tensor, codebook: Tensor, return_distance: bool) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    indices = torch.empty(len(rows), dtype=torch.int64, device=x.device)
    codes = Codes(codebook)
    for part, scores, row_norms in codes.chunks(rows):
        best, found = scores.min(1, keepdim=True)
        threshold = best + codes.tie_tolerance(row_norms, found)
        # argmax of a 0/1 matrix is the first 1: the lowest of the tying indices.
        indices[part] = (scores <= threshold).to(torch.uint8).argmax(1)
    shape = x.shape[:-1]
    if return_distance:
        return indices.view(shape), squared_distances(rows, codebook, indices[:, None]).view(shape)
    return indices.view(shape), x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))

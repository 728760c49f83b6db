"""Reference of `one_hot`."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(indices: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
    per_vector = indices if indices.ndim == 2 else indices[:, None]  # [N, k]
    # The last column, which is cut off, takes the ones of the index -1.
    columns = torch.where(per_vector < 0, num_codes, per_vector)
    out = torch.zeros(len(indices), num_codes + 1, dtype=dtype, device=indices.device).scatter_(1, columns, 1)
    return out[:, :num_codes].contiguous()

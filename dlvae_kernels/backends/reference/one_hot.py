"""Reference of `one_hot`."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(indices: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
    per_vector = indices if indices.ndim == 2 else indices[:, None]  # [N, k]
    return torch.zeros(len(indices), num_codes, dtype=dtype, device=indices.device).scatter_(1, per_vector, 1)

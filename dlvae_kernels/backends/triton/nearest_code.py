"""Triton `nearest_code`: the search in `search/`."""

from __future__ import annotations

import torch
from torch import Tensor

from .language.rows import as_rows, heads_of
from .search.launch import search


def nearest_code(x: Tensor, codebook: Tensor, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    distances = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if indices.numel() > 0:
        search(as_rows(x, heads_of(codebook)), codebook, precision, indices, distances)
    return indices, distances if return_distance else distances.new_empty(0)

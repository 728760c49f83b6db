"""Triton `topk_codes`: scores that stay on the chip where codes are few, else candidates above a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from .limits import MOST_ON_CHIP
from .rows import as_rows
from .topk_on_chip import topk_on_chip
from .topk_stream import topk_stream
from .tuning import on_device


def topk_codes(x: Tensor, dictionary: Tensor, k: int, metric: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    indices = torch.empty(*x.shape[:-1], k, dtype=torch.int64, device=x.device)
    values = torch.empty(*x.shape[:-1], k, dtype=torch.float32, device=x.device)
    if indices.numel() > 0:
        topk = topk_on_chip if len(dictionary) <= MOST_ON_CHIP else topk_stream
        with on_device(x):
            topk(as_rows(x), dictionary, metric, None if bias is None else bias.contiguous(), indices, values)
    return indices, values

"""Triton `topk_codes`: all scores on the chip if codes are few, else a list of candidates (see `topk/`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .architectures import on_device
from .language.rows import as_codes, as_rows
from .topk.limits import MAX_CODES_ON_CHIP
from .topk.on_chip import topk_on_chip
from .topk.rank import Inputs
from .topk.stream import topk_stream


def topk_codes(x: Tensor, dictionary: Tensor, k: int, metric: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    indices = torch.empty(*x.shape[:-1], k, dtype=torch.int64, device=x.device)
    values = torch.empty(*x.shape[:-1], k, dtype=torch.float32, device=x.device)
    if indices.numel() > 0:
        topk = topk_on_chip if len(dictionary) <= MAX_CODES_ON_CHIP else topk_stream
        bias = None if bias is None else bias.contiguous()
        inputs = Inputs(as_rows(x), as_codes(dictionary), bias, metric == "dot")
        with on_device(x):
            topk(inputs, indices, values)
    return indices, values

"""Sizes, dtypes and layouts that the tests of all operations share."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Whether Triton kernels run in Triton's interpreter, which is slow for each program.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)
# (N, K, D): empty, single, below and above every tile, one code, one feature.
SIZES = ((0, 5, 4), (1, 1, 1), (1, 3, 7), (63, 17, 3), (63, 1, 8), (507, 129, 64), (507, 257, 100), (130, 64, 1))


def vectors(n: int, d: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, device=device).to(dtype)


def layouts(n: int, d: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """About n vectors [..., D] in every kind of strides."""
    side = max(1, int(n**0.5))
    channel_first = torch.randn(2, d, side, side, device=device).to(dtype)
    return {
        "contiguous": vectors(n, d, device, dtype),
        "channel_first": channel_first.flatten(2).transpose(1, 2),
        "channels_last": channel_first.to(memory_format=torch.channels_last).flatten(2).transpose(1, 2),
        "sliced": torch.randn(n, 2 * d, device=device).to(dtype)[:, ::2],
        "offset": vectors(n + 3, d, device, dtype)[3:],
        "transposed": torch.randn(d, n, device=device).to(dtype).T,
        "expanded": torch.randn(1, d, device=device).to(dtype).expand(n, d),
        "vector": torch.randn(d, device=device).to(dtype),
        # Three leading dimensions, of which no two can be merged in one stride.
        "permuted": torch.randn(3, d, 2, 4, device=device).to(dtype).permute(2, 0, 3, 1),
        "permuted_expanded": torch.randn(2, 3, 4, d, device=device)
        .to(dtype)
        .permute(2, 0, 1, 3)[:, :, :1]
        .expand(4, 2, 5, d),
        "deep": torch.randn(2, 3, 1, d, device=device).to(dtype),
    }

"""What the machine can do at best, measured in the same run: a matrix product, or scores of a search, and a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import conv2d

from dlvae_kernels.backends import native

from .entry import Work

_GEMM = {"cpu": 2048, "cuda": 8192}
_MAP = {"cpu": 64, "cuda": 2048}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
_ROUNDS = 7
# Products of float32 accuracy from bfloat16 parts take three of them.
_TERMS = 3


@dataclass(frozen=True)
class Ceilings:
    """Operations a second of the matrix product by precision, and bytes a second (read and written) of a copy."""

    flops: dict[str, float]
    bytes: float

    def seconds(self, work: Work, precision: str) -> float:
        """The time under which no implementation comes."""
        return max(work.flops / self.flops.get(precision, self.flops["float32"]), work.bytes / self.bytes)

    def rows(self) -> list[dict[str, Any]]:
        """Rows that say what was measured."""
        found = {"copy": f"{self.bytes / 1e9:.1f} GB/s"}
        found |= {f"matrix product, {name}": f"{rate / 1e9:.1f} GFLOP/s" for name, rate in self.flops.items()}
        return [{"op": "ceiling", "pass": "forward", "contender": name, "status": rate} for name, rate in found.items()]


def measure(device: torch.device) -> Ceilings:
    source = torch.rand(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    flops = {"float32": product_rate(device, torch.float32)}
    if has_products(device, torch.float16):
        flops["float16"] = product_rate(device, torch.float16)
    if has_products(device, torch.bfloat16):
        flops["bfloat16"] = product_rate(device, torch.bfloat16)
        flops["float32"] = max(flops["float32"], flops["bfloat16"] / _TERMS)
        flops["tf32"] = flops["bfloat16"] / 2
    if (
        device.type == "cpu"
        and native.unavailable_reason("nearest_code") is None
        and hasattr(torch.ops.dlvae_native, "search_rate")
    ):
        # Scores of float32 accuracy, from whatever products are fastest: torch's own may fall far behind.
        flops["float32"] = max(flops["float32"], 2 * torch.ops.dlvae_native.search_rate())
    return Ceilings(flops, copied)


def has_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are fast products of float16 or bfloat16: where oneDNN has none, torch's own takes minutes."""
    of_onednn = {
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    }
    return device.type == "cuda" or of_onednn[dtype]()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of torch's product of two large matrices."""
    size = _GEMM[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of torch's convolution of large maps, 3 x 3 and channels last."""
    size, channels = _MAP[device.type], 256
    maps = torch.randn(size, channels, 16, 16, device=device).to(dtype, memory_format=torch.channels_last)
    kernels = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    return 2 * 9 * channels**2 * size * 16**2 / _best(lambda: conv2d(maps, kernels, padding=1), device)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs, in seconds: a limit is not an average."""
    times = []
    for _ in range(_ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])

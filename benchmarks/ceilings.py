"""The best rates of the machine, measured in the same run: a matrix product (or the scores of a search) and a copy."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import conv2d

from dlvae_kernels.backends import native

from .entry import Work
from .inputs import Size

_GEMM = {"cpu": 2048, "cuda": 8192}  # N = K = D
_MAP = {"cpu": 64, "cuda": 2048}  # batch size
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
_ROUNDS = 7
# A product of float32 accuracy from bfloat16 terms takes three bfloat16 products.
_TERMS = 3


@dataclass(frozen=True)
class Ceilings:
    """Operations a second of matrix products by precision, and bytes a second (read and written) of a copy."""

    flops: dict[str, float]
    bytes: float

    def seconds(self, work: Work, size: Size, precision: str) -> float:
        """The lower bound of the time of any implementation."""
        rate = self.flops.get(precision, self.flops["float32"])
        return max(work.flops(size) / rate, work.bytes(size) / self.bytes)

    def rows(self) -> list[dict[str, Any]]:
        """Rows that state the measured rates."""
        found = {"copy": f"{self.bytes / 1e9:.1f} GB/s"}
        found |= {f"matrix product, {name}": f"{rate / 1e9:.1f} GFLOP/s" for name, rate in self.flops.items()}
        return [
            {"op": "ceiling", "pass": "forward", "implementation": name, "status": rate} for name, rate in found.items()
        ]


def measure(device: torch.device) -> Ceilings:
    source = torch.rand(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    names = [name for name in ("float32", "float16", "bfloat16") if has_products(device, getattr(torch, name))]
    flops = {name: product_rate(device, getattr(torch, name)) for name in names}
    if "bfloat16" in flops:
        flops["float32"] = max(flops["float32"], flops["bfloat16"] / _TERMS)
        flops["tf32"] = flops["bfloat16"] / 2
    is_native = device.type == "cpu" and native.unavailable_reason("nearest_code") is None
    if is_native and hasattr(torch.ops.dlvae_native, "search_rate"):
        # The scores of the native search use the fastest products of the processor, which torch may not use.
        flops["float32"] = max(flops["float32"], 2 * torch.ops.dlvae_native.search_rate())
    return Ceilings(flops, copied)


def has_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are fast. Without oneDNN's float16 or bfloat16, torch's products take minutes."""
    onednn = {
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    }
    return device.type == "cuda" or dtype == torch.float32 or onednn[dtype]()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of torch's product of two large matrices."""
    size = _GEMM[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of torch's 3 x 3 convolution of large channels-last maps."""
    batch, channels = _MAP[device.type], 256
    maps = torch.randn(batch, channels, 16, 16, device=device).to(dtype, memory_format=torch.channels_last)
    kernels = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    return 2 * 9 * channels**2 * batch * 16**2 / _best(lambda: conv2d(maps, kernels, padding=1), device)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a few runs in seconds, without the first: a ceiling is a minimum, not an average."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(run, return_mode="min")
    return min(timeit.repeat(run, number=1, repeat=_ROUNDS + 1)[1:])

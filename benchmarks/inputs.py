"""The size of a workload, and random inputs of that size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Size:
    """The size of a workload: N vectors, K codes, D features, and k selected codes (or levels) for each vector."""

    workload: str
    n: int
    k: int
    d: int
    selected: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return " x ".join(map(str, (self.n, self.k, self.d, *([self.selected] if self.selected > 1 else []))))

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Random inputs of one size. Each entry uses the tensors that it needs."""

    size: Size
    x: Tensor  # [N, D]
    codes: Tensor  # [K, D]
    indices: Tensor  # [N, k] int64
    values: Tensor  # [N, k]
    grad: Tensor  # [N, D], the gradient of the output

    @property
    def codebooks(self) -> Tensor:
        """Codebooks [k, K, D] of k levels from the same codes: each level has other directions and half the lengths."""
        return torch.stack([self.codes.roll(level, 1) * 0.5**level for level in range(self.size.selected)])

    @property
    def map(self) -> Tensor:
        """The vectors as a channel-first feature map [B, D, h, w], with 8 x 8 positions if N is a multiple of 64."""
        side = 8 if self.size.n % 64 == 0 else 1
        return to_map(self.x, (self.size.n // side**2, self.size.d, side, side))


def to_map(vectors: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Vectors [B * h * w, D] as a contiguous map of `shape` [B, D, h, w]."""
    batch, dim, height, width = shape
    return vectors.view(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()


def to_vectors(map: Tensor) -> Tensor:
    """A map [B, D, h, w] as vectors [B * h * w, D]."""
    return map.permute(0, 2, 3, 1).reshape(-1, map.shape[1])


def draw(size: Size, device: torch.device, seed: int = 0, unit: bool = False) -> Inputs:
    """Normally distributed inputs. With `unit`, vectors and codes have length 1: cosine and distance then agree."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(size.dtype)

    x, codes = normal(size.n, size.d), normal(size.k, size.d)
    if unit:
        x, codes = normalize(x, dim=1), normalize(codes, dim=1)
    indices = torch.randint(0, size.k, (size.n, size.selected), device=device, generator=generator)
    return Inputs(size, x, codes, indices, normal(size.n, size.selected), normal(size.n, size.d))

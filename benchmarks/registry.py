"""What is timed: for each operation its sizes, its inputs, ours and the plain PyTorch expression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dlvae_kernels as dlvae

Contenders = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """An operation at one size; `contenders` makes inputs on a device and gives what to time, ours first."""

    op: str
    size: tuple[int, ...]  # N, K, D and, where atoms are kept, k
    contenders: Callable[[torch.device], Contenders]


def _expression(x: Tensor, codes: Tensor) -> Tensor:
    """The squared distances that users write by hand, [N, K]."""
    return x.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * x @ codes.T


def _nearest_code(n: int, k: int, d: int) -> Case:
    def contenders(device: torch.device) -> Contenders:
        x, codebook = torch.randn(n, d, device=device), torch.randn(k, d, device=device)
        return {
            "dlvae_kernels": lambda: dlvae.nearest_code(x, codebook),
            "plain PyTorch": lambda: _expression(x, codebook).argmin(1),
        }

    return Case("nearest_code", (n, k, d), contenders)


def _topk_codes(n: int, k: int, d: int, kept: int) -> Case:
    def contenders(device: torch.device) -> Contenders:
        x, dictionary = torch.randn(n, d, device=device), torch.randn(k, d, device=device)
        return {
            "dlvae_kernels": lambda: dlvae.topk_codes(x, dictionary, kept),
            "plain PyTorch": lambda: _expression(x, dictionary).topk(kept, dim=1, largest=False),
        }

    return Case("topk_codes", (n, k, d, kept), contenders)


def _ema_update(n: int, k: int, d: int) -> Case:
    def contenders(device: torch.device) -> Contenders:
        x, indices = torch.randn(n, d, device=device), torch.randint(0, k, (n,), device=device)
        codebook, sizes = torch.randn(k, d, device=device), torch.ones(k, device=device)
        sums = codebook.clone()

        def by_one_hot() -> None:
            encodings = torch.nn.functional.one_hot(indices, k).to(x.dtype)
            sizes.mul_(0.99).add_(encodings.sum(0), alpha=0.01)
            sums.mul_(0.99).add_(encodings.T @ x, alpha=0.01)
            codebook.copy_(sums / sizes[:, None])

        return {
            "dlvae_kernels": lambda: dlvae.ema_update(codebook, sizes, sums, x, indices, decay=0.99, epsilon=1e-5),
            "plain PyTorch": by_one_hot,
        }

    return Case("ema_update", (n, k, d), contenders)


def _sparse_decode(n: int, k: int, d: int, kept: int) -> Case:
    def contenders(device: torch.device) -> Contenders:
        values = torch.randn(n, kept, device=device, requires_grad=True)
        indices = torch.randint(0, k, (n, kept), device=device)
        dictionary = torch.randn(k, d, device=device, requires_grad=True)

        def dense() -> None:
            coefficients = torch.zeros(n, k, device=device).scatter_add(1, indices, values)
            (coefficients @ dictionary).sum().backward()

        return {
            "dlvae_kernels": lambda: dlvae.sparse_decode(values, indices, dictionary).sum().backward(),
            "plain PyTorch": dense,
        }

    return Case("sparse_decode, forward and backward", (n, k, d, kept), contenders)


CPU_CASES = (
    _nearest_code(16_384, 512, 64),
    _nearest_code(4_096, 8_192, 256),
    _nearest_code(16_384, 16_384, 8),
    _topk_codes(16_384, 512, 256, 100),
    _ema_update(16_384, 512, 64),
    _ema_update(4_096, 8_192, 256),
    _sparse_decode(16_384, 512, 256, 100),
)
CUDA_CASES = (
    *CPU_CASES,
    _nearest_code(65_536, 1_024, 64),
    _nearest_code(16_384, 8_192, 256),
    _ema_update(131_072, 512, 64),
)

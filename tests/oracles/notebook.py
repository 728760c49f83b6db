"""The three layers of the VQ-VAE notebook with its bugs fixed: the formulas that this library's layers must match.

The source is a VQ-VAE notebook of 2023 that contains a DictionaryLearning layer; it is not the notebook of
zalandoresearch. These bugs of the notebook are fixed here:

- It assigned vectors to the farthest code (argmax) instead of the nearest code (argmin).
- Its EMA state started inconsistent, was replaced instead of updated, was stored smoothed, and moved codes that no
  vector of the batch was assigned to.
- The distances to the atoms of the dictionary lacked a transpose.
- The quantized feature map had its dimensions in the wrong order.
- The straight-through output was 2 R - x instead of the reconstruction R.
- The L1 penalty was a sum over positions instead of a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _distances(x: Tensor, codes: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * x @ codes.T


def _flat(inputs: Tensor) -> Tensor:
    return inputs.permute(0, 2, 3, 1).reshape(-1, inputs.shape[1])


def _map(vectors: Tensor, like: Tensor) -> Tensor:
    batch, _, height, width = like.shape
    return vectors.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _perplexity(encodings: Tensor) -> Tensor:
    usage = encodings.mean(0)
    return torch.exp(-torch.sum(usage * torch.log(usage + 1e-10)))


class VectorQuantizer(nn.Module):
    def __init__(self, codebook: Tensor, commitment_cost: float) -> None:
        super().__init__()
        self.codebook = nn.Parameter(codebook.clone())
        self.commitment_cost = commitment_cost

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = _flat(inputs)
        encodings = F.one_hot(_distances(x, self.codebook).argmin(1), len(self.codebook)).to(x.dtype)
        quantized = encodings @ self.codebook
        loss = F.mse_loss(quantized, x.detach()) + self.commitment_cost * F.mse_loss(quantized.detach(), x)
        return loss, _map(x + (quantized - x).detach(), inputs), _perplexity(encodings), encodings


class VectorQuantizerEMA(nn.Module):
    def __init__(self, codebook: Tensor, commitment_cost: float, decay: float, epsilon: float) -> None:
        super().__init__()
        self.codebook, self.sums, self.sizes = codebook.clone(), codebook.clone(), codebook.new_ones(len(codebook))
        self.commitment_cost, self.decay, self.epsilon = commitment_cost, decay, epsilon

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = _flat(inputs)
        encodings = F.one_hot(_distances(x, self.codebook).argmin(1), len(self.codebook)).to(x.dtype)
        quantized = encodings @ self.codebook
        if self.training:
            self._update(x.detach(), encodings)
        loss = self.commitment_cost * F.mse_loss(quantized, x)
        return loss, _map(x + (quantized - x).detach(), inputs), _perplexity(encodings), encodings

    def _update(self, x: Tensor, encodings: Tensor) -> None:
        self.sizes = self.sizes * self.decay + (1 - self.decay) * encodings.sum(0)
        self.sums = self.sums * self.decay + (1 - self.decay) * encodings.T @ x
        n = self.sizes.sum()
        smoothed = (self.sizes + self.epsilon) / (n + len(self.sizes) * self.epsilon) * n
        is_assigned = encodings.sum(0) > 0
        self.codebook = torch.where(is_assigned[:, None], self.sums / smoothed[:, None], self.codebook)


class DictionaryLearning(nn.Module):
    def __init__(self, dim: int, num_atoms: int, sparsity: float, sparsity_level: int) -> None:
        super().__init__()
        self.dictionary = nn.Parameter(torch.rand(num_atoms, dim))
        self.representation = nn.Sequential(nn.Linear(dim, num_atoms), nn.Softmax(dim=1))
        self.sparsity, self.sparsity_level = sparsity, sparsity_level

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = _flat(inputs)
        nearest = torch.topk(-_distances(x, self.dictionary), self.sparsity_level, dim=1).indices
        mask = x.new_zeros(len(x), len(self.dictionary)).scatter(1, nearest, 1)
        representation = self.representation(x) * mask
        reconstruction = representation @ self.dictionary
        loss = F.mse_loss(x, reconstruction.detach()) * 0.25 + F.mse_loss(x.detach(), reconstruction)
        loss = loss + self.sparsity * representation.abs().sum(1).mean()
        return loss, _map(x + (reconstruction - x).detach(), inputs), representation

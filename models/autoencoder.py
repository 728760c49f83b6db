"""The convolutional encoder and decoder around a bottleneck.

Layers and names are those of the VQ-VAE notebook that docs/training.md describes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from dlvae_kernels.layers.usage import CodebookUsage


class Residual(nn.Module):
    def __init__(self, in_channels: int, num_hiddens: int, num_residual_hiddens: int) -> None:
        super().__init__()
        self._block = nn.Sequential(
            # In place, as in the notebook: the skip connection therefore adds the rectified input.
            nn.ReLU(True),
            nn.Conv2d(in_channels, num_residual_hiddens, kernel_size=3, padding=1, bias=False),
            nn.ReLU(True),
            nn.Conv2d(num_residual_hiddens, num_hiddens, kernel_size=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self._block(x)


class ResidualStack(nn.Module):
    def __init__(self, in_channels: int, num_hiddens: int, num_residual_layers: int, num_residual_hiddens: int) -> None:
        super().__init__()
        self._layers = nn.ModuleList(
            Residual(in_channels, num_hiddens, num_residual_hiddens) for _ in range(num_residual_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._layers:
            x = layer(x)
        return relu(x)


class Encoder(nn.Module):
    """[B, in_channels, H, W] -> [B, num_hiddens, H / 4, W / 4]."""

    def __init__(self, in_channels: int, num_hiddens: int, num_residual_layers: int, num_residual_hiddens: int) -> None:
        super().__init__()
        self._conv_1 = nn.Conv2d(in_channels, num_hiddens // 2, kernel_size=4, stride=2, padding=1)
        self._conv_2 = nn.Conv2d(num_hiddens // 2, num_hiddens, kernel_size=4, stride=2, padding=1)
        self._conv_3 = nn.Conv2d(num_hiddens, num_hiddens, kernel_size=3, padding=1)
        self._residual_stack = ResidualStack(num_hiddens, num_hiddens, num_residual_layers, num_residual_hiddens)

    def forward(self, inputs: Tensor) -> Tensor:
        x = relu(self._conv_1(inputs))
        x = relu(self._conv_2(x))
        return self._residual_stack(self._conv_3(x))


class Decoder(nn.Module):
    """[B, in_channels, h, w] -> [B, out_channels, 4 h, 4 w]."""

    def __init__(
        self,
        in_channels: int,
        num_hiddens: int,
        num_residual_layers: int,
        num_residual_hiddens: int,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        self._conv_1 = nn.Conv2d(in_channels, num_hiddens, kernel_size=3, padding=1)
        self._residual_stack = ResidualStack(num_hiddens, num_hiddens, num_residual_layers, num_residual_hiddens)
        self._conv_trans_1 = nn.ConvTranspose2d(num_hiddens, num_hiddens // 2, kernel_size=4, stride=2, padding=1)
        self._conv_trans_2 = nn.ConvTranspose2d(num_hiddens // 2, out_channels, kernel_size=4, stride=2, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self._residual_stack(self._conv_1(inputs))
        x = relu(self._conv_trans_1(x))
        return self._conv_trans_2(x)


class Coding(NamedTuple):
    """The output of the bottleneck for latents [B, D, h, w]."""

    loss: Tensor
    latents: Tensor  # [B, D, h, w], the input of the decoder
    indices: Tensor  # [B, h, w] codes, or [B, h, w, k] atoms
    values: Tensor | None  # [B, h, w, k] coefficients of the atoms; None for codes, whose only coefficient is 1

    def counts(self, num_codes: int) -> Tensor:
        """Number of latent vectors that are assigned to each code or atom, int64 [K]."""
        # bincount would wait for the GPU.
        indices = self.indices.flatten()
        return indices.new_zeros(num_codes).scatter_add_(0, indices, torch.ones_like(indices))

    def nonzeros(self) -> Tensor:
        """Number of coefficients that are not zero, a scalar."""
        return torch.tensor(self.indices.numel()) if self.values is None else self.values.count_nonzero()


def perplexity(counts: Tensor) -> Tensor:
    """Exponential of the entropy of the assignments; `counts` is [..., K], the result [...] in [1, K]."""
    probability = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(probability).sum(-1).exp()


class Autoencoder(nn.Module):
    """Encoder, 1x1 convolution to D channels, the bottleneck of a subclass, decoder."""

    def __init__(
        self,
        num_hiddens: int,
        num_residual_layers: int,
        num_residual_hiddens: int,
        embedding_dim: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self._encoder = Encoder(in_channels, num_hiddens, num_residual_layers, num_residual_hiddens)
        self._pre_vq_conv = nn.Conv2d(num_hiddens, embedding_dim, kernel_size=1)
        self._decoder = Decoder(embedding_dim, num_hiddens, num_residual_layers, num_residual_hiddens, in_channels)

    @property
    def codes(self) -> Tensor:
        """The codebook or dictionary, [K, D]."""
        raise NotImplementedError

    @property
    def usage(self) -> CodebookUsage | None:
        """How evenly the codes were used in the last training steps; None for a dictionary."""
        return None

    def encode(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> latents before the bottleneck, [B, D, H / 4, W / 4]."""
        return self._pre_vq_conv(self._encoder(x))

    def code(self, latents: Tensor) -> Coding:
        """Pass latents through the bottleneck."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Latents after the bottleneck -> images."""
        return self._decoder(latents)

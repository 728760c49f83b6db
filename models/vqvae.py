"""The autoencoder with a vector-quantizer bottleneck."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dlvae_kernels import VectorQuantizer, VectorQuantizerEMA
from dlvae_kernels.layers.codebook_state import Init, Threshold
from dlvae_kernels.layers.usage import CodebookUsage

from .autoencoder import Autoencoder, Coding


class VQVAE(Autoencoder):
    """VQ-VAE: `VectorQuantizerEMA` for decay > 0, else `VectorQuantizer`, whose codebook learns by gradient.

    Source: van den Oord et al. 2017, arXiv:1711.00937.
    """

    def __init__(
        self,
        num_hiddens: int,
        num_residual_layers: int,
        num_residual_hiddens: int,
        num_embeddings: int,
        embedding_dim: int,
        commitment_cost: float,
        decay: float = 0,
        *,
        in_channels: int = 3,
        init: Init | None = None,
        dead_code_threshold: Threshold = 0.0,
    ) -> None:
        super().__init__(num_hiddens, num_residual_layers, num_residual_hiddens, embedding_dim, in_channels)
        sizes = num_embeddings, embedding_dim, commitment_cost
        options: dict[str, Any] = {"encodings": "indices", "dead_code_threshold": dead_code_threshold}
        self._vq_vae: VectorQuantizer | VectorQuantizerEMA
        if decay > 0:
            self._vq_vae = VectorQuantizerEMA(*sizes, decay, init=init or "normal", **options)
        else:
            self._vq_vae = VectorQuantizer(*sizes, init=init or "uniform", **options)

    @property
    def codes(self) -> Tensor:
        return self._vq_vae.codebook

    @property
    def usage(self) -> CodebookUsage:
        return self._vq_vae.usage

    def code(self, latents: Tensor) -> Coding:
        loss, quantized, _, indices = self._vq_vae(latents)
        return Coding(loss, quantized, indices, None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, C, H, W] -> (quantizer loss, reconstruction [B, C, H, W], perplexity)."""
        loss, quantized, perplexity, _ = self._vq_vae(self.encode(x))
        return loss, self.decode(quantized), perplexity

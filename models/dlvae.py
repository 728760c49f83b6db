"""The autoencoder with a dictionary-learning bottleneck."""

from __future__ import annotations

from torch import Tensor

from dlvae_kernels import DictionaryLearning, SparseRepresentation
from dlvae_kernels.layers.dictionary_learning import Gradient

from .autoencoder import Autoencoder, Coding


class DictionaryLearningVAE(Autoencoder):
    """Autoencoder whose latents are sparse combinations of the atoms of a learned dictionary."""

    def __init__(
        self,
        num_hiddens: int,
        num_residual_layers: int,
        num_residual_hiddens: int,
        num_embeddings: int,
        embedding_dim: int,
        sparsity: float = 0.0,
        sparsity_level: int = 100,
        *,
        in_channels: int = 3,
        gradient: Gradient = "straight_through",
    ) -> None:
        super().__init__(num_hiddens, num_residual_layers, num_residual_hiddens, embedding_dim, in_channels)
        self._dl = DictionaryLearning(
            embedding_dim, num_embeddings, sparsity, sparsity_level, representation="sparse", gradient=gradient
        )

    @property
    def codes(self) -> Tensor:
        return self._dl.dictionary

    def code(self, latents: Tensor) -> Coding:
        loss, reconstruction, (values, indices) = self._dl(latents)
        return Coding(loss, reconstruction, indices, values)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, SparseRepresentation]:
        """Images [B, C, H, W] -> (dictionary loss, reconstruction [B, C, H, W], sparse representation)."""
        loss, latents, representation = self._dl(self.encode(x))
        return loss, self.decode(latents), representation

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..functional.checks import check_at_least, check_choice, check_indices, check_size
from ..functional.kept_softmax import kept_softmax
from ..functional.sparse_decode import sparse_decode
from ..functional.straight_through import straight_through
from ..functional.topk_codes import topk_codes
from .maps import codes_to_map, map_to_vectors, vectors_to_map

Gradient = Literal["straight_through", "direct"]

# Weight of the commitment of x to its reconstruction, as in the VQ-VAE notebook.
_COMMITMENT_COST = 0.25


class SparseRepresentation(NamedTuple):
    """Coefficients of the selected atoms: values [B, *spatial, k] and int64 indices [B, *spatial, k].

    >>> layer = DictionaryLearning(dim=4, num_atoms=8, sparsity=0.1, sparsity_level=2)
    >>> layer.encode(torch.randn(2, 4, 5, 5)).values.shape
    torch.Size([2, 5, 5, 2])
    """

    values: Tensor
    indices: Tensor


class DictionaryLearning(nn.Module):
    """Sparse coding of each position of a map over a learned dictionary.

    The coefficients are softmax(Linear(x)) over all atoms, at the `sparsity_level` atoms nearest to x; the
    reconstruction R is the sum of the atoms weighted by them.
    loss = mean (sg[x] - R)^2 + 0.25 * mean (x - sg[R])^2 + sparsity * mean over positions of sum |coefficients|.

    Args:
        dim: D, the channels of the map.
        num_atoms: K, the size of the dictionary.
        sparsity: weight of the L1 norm of the coefficients, >= 0; the norm is a mean over positions, so that it
            does not grow with the batch.
        sparsity_level: k, the number of atoms selected for each position, 1 <= k <= K.
        representation: the form of the last output of `forward`: "dense" ([N, K]) or "sparse" (`SparseRepresentation`).
        gradient: the path of the gradient of the reconstruction: "straight_through" (to x unchanged; the
            dictionary and the coefficients learn only from the loss) or "direct" (through coefficients and atoms).
        channel_last: maps are [B, *spatial, D].
    Raises:
        ValueError: an argument is out of its range.

    state_dict: `dictionary` [K, D], `representation.0.weight` [K, D], `representation.0.bias` [K].

    >>> layer = DictionaryLearning(dim=4, num_atoms=8, sparsity=0.1, sparsity_level=2)
    >>> loss, reconstruction, representation = layer(torch.randn(2, 4, 5, 5))
    >>> reconstruction.shape, representation.shape
    (torch.Size([2, 4, 5, 5]), torch.Size([50, 8]))

    Source: the DictionaryLearning layer of a VQ-VAE notebook of October 2023, which docs/training.md describes.
    """

    def __init__(
        self,
        dim: int,
        num_atoms: int,
        sparsity: float,
        sparsity_level: int,
        *,
        representation: Literal["dense", "sparse"] = "dense",
        gradient: Gradient = "straight_through",
        channel_last: bool = False,
    ) -> None:
        super().__init__()
        self.dim = check_size("dim", dim, 1)
        self.num_atoms = check_size("num_atoms", num_atoms, 1)
        self.sparsity_level = check_size("sparsity_level", sparsity_level, 1, self.num_atoms)
        check_at_least("sparsity", sparsity, 0)
        check_choice("representation", representation, ("dense", "sparse"))
        check_choice("gradient", gradient, ("straight_through", "direct"))
        self.sparsity = sparsity
        self.dictionary = nn.Parameter(torch.rand(self.num_atoms, self.dim))
        self.representation = nn.Sequential(nn.Linear(self.dim, self.num_atoms), nn.Softmax(dim=-1))
        self._representation = representation
        self._gradient = gradient
        self._channel_last = channel_last

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters anew, as the constructor does; after `to_empty` too."""
        self.dictionary.uniform_()
        linear: Any = self.representation[0]
        linear.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | SparseRepresentation]:
        """Reconstruct a map from its sparse coefficients.

        Args:
            x: [B, D, *spatial], or [B, *spatial, D] with channel_last, float16, bfloat16 or float32.
        Returns:
            loss: scalar float32.
            reconstruction: shape and dtype of x.
            representation: the coefficients, dense [B * positions, K] or a `SparseRepresentation`.
        Raises:
            ValueError: rank, D, dtype or device do not fit.
        """
        vectors = self._as_vectors(x)
        values, indices = self._coefficients(vectors)
        decoded = sparse_decode(values, indices, self.dictionary)
        # `straight` is exactly the reconstruction R, where x + (R - x) would be rounded.
        straight, dictionary_loss, commitment_loss = straight_through(vectors, decoded, indices[..., 0])
        # The coefficients of a softmax are positive.
        norm = values.sum() / max(1, indices[..., 0].numel())
        loss = dictionary_loss + _COMMITMENT_COST * commitment_loss + self.sparsity * norm
        if self._gradient == "straight_through":
            decoded = straight
        reconstruction = vectors_to_map(decoded.to(x.dtype), x, self._channel_last)
        if self._representation == "sparse":
            return loss, reconstruction, self._sparse_map(values, indices, x)
        return loss, reconstruction, self._dense(values, indices)

    def encode(self, x: Tensor) -> SparseRepresentation:
        """The coefficients of each position; `x` as in `forward`."""
        values, indices = self._coefficients(self._as_vectors(x))
        return self._sparse_map(values, indices, x)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """The map [B, D, *spatial] of coefficients values and int64 indices, both [B, *spatial, k].

        Raises:
            ValueError: shapes or dtypes do not fit, or (on the CPU) an index lies outside [0, K).
        """
        check_indices("indices", indices)
        if indices.ndim < 2:
            raise ValueError(f"expected indices of shape [B, *spatial, k], got {tuple(indices.shape)}")
        return codes_to_map(sparse_decode(values, indices, self.dictionary), self._channel_last)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_atoms={self.num_atoms}, sparsity={self.sparsity},"
            f" sparsity_level={self.sparsity_level}, representation={self._representation!r},"
            f" gradient={self._gradient!r}, channel_last={self._channel_last}"
        )

    def _as_vectors(self, x: Tensor) -> Tensor:
        """Check a map and view it as vectors [B, S, D]."""
        return map_to_vectors("x", x, "dictionary", self.dictionary, self._channel_last)

    def _coefficients(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the nearest atoms and their indices, both [B, S, k]."""
        indices, _ = topk_codes(vectors, self.dictionary, self.sparsity_level)
        linear: Any = self.representation[0]
        return kept_softmax(vectors, linear.weight, linear.bias, indices), indices

    def _dense(self, values: Tensor, indices: Tensor) -> Tensor:
        values, indices = values.flatten(0, -2), indices.flatten(0, -2)  # [N, k]
        return values.new_zeros(values.shape[0], self.num_atoms).scatter(1, indices, values)

    def _sparse_map(self, values: Tensor, indices: Tensor, x: Tensor) -> SparseRepresentation:
        spatial = x.shape[1:-1] if self._channel_last else x.shape[2:]
        shape = (x.shape[0], *spatial, self.sparsity_level)
        return SparseRepresentation(values.view(shape), indices.view(shape))

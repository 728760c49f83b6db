from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional.autocast import without_autocast
from ..functional.checks import check_at_least, check_choice, check_size
from ..functional.gather_codes import gather_codes
from ..functional.nearest_code import nearest_code
from ..functional.vector_quantize import GRADIENTS, Gradient, vector_quantize
from .maps import codes_to_map, long_indices, map_to_vectors, spatial_shape, vectors_to_map
from .usage import perplexity_of


class SimVQOutput(NamedTuple):
    """The result of `SimVQ`, whose `forward` describes the fields.

    >>> SimVQOutput._fields
    ('loss', 'quantized', 'perplexity', 'indices')
    """

    loss: Tensor
    quantized: Tensor
    perplexity: Tensor
    indices: Tensor


class TransformedCodebook(nn.Module):
    """Codes [K, D] that a module computes from frozen random vectors [K, F]; F is D by default.

    The base of the quantizers that have such a codebook; `transform` is `nn.Linear(F, D, bias=False)` by default.
    """

    frozen_codebook: Tensor
    code_transform: nn.Module

    def __init__(self, dim: int, codebook_size: int, frozen_dim: int | None, transform: nn.Module | None) -> None:
        super().__init__()
        self.dim = check_size("dim", dim, 1)
        self.codebook_size = check_size("codebook_size", codebook_size, 1)
        self.frozen_dim = self.dim if frozen_dim is None else check_size("frozen_dim", frozen_dim, 1)
        self.register_buffer("frozen_codebook", torch.empty(self.codebook_size, self.frozen_dim))
        self._draw_frozen_codebook()
        self.code_transform = nn.Linear(self.frozen_dim, self.dim, bias=False) if transform is None else transform

    @property
    def codebook(self) -> Tensor:
        """The codes [K, D], which have a gradient to the transform."""
        with without_autocast(self.frozen_codebook):
            return self.code_transform(self.frozen_codebook)

    @torch.no_grad()
    def _draw_frozen_codebook(self) -> None:
        self.frozen_codebook.normal_(std=self.frozen_dim**-0.5)

    def _checked_codebook(self) -> Tensor:
        codebook = self.codebook
        if codebook.shape != (self.codebook_size, self.dim):
            raise ValueError(
                f"expected transform to map [K, {self.frozen_dim}] to codes of shape"
                f" {(self.codebook_size, self.dim)}, got {tuple(codebook.shape)}"
            )
        return codebook


class SimVQ(TransformedCodebook):
    """Vector quantizer whose codebook is a learned linear transform of frozen random vectors.

    A gradient moves all codes together, those that no vector is assigned to included, so that few codes die.
    loss = mean (q - sg[x])^2 + commitment_cost * mean (sg[q] - x)^2, with q the nearest code of each position in
    `code_transform(frozen_codebook)` and sg the stopped gradient.

    Args:
        dim: D, the channels of the map.
        codebook_size: K, the number of codes.
        commitment_cost: beta, >= 0.
        frozen_dim: F, the features of the frozen vectors; by default D. They are drawn from a normal distribution of
            variance 1 / F.
        transform: a module that maps [K, F] to the codes [K, D]; by default `nn.Linear(F, D, bias=False)`.
        gradient: what passes from quantized to the inputs: "straight_through" (the gradient unchanged, as in the
            source) or "rotation" (`rotation_trick`, the default of vector-quantize-pytorch).
        channel_last: maps are [B, *spatial, D].
    Raises:
        ValueError: an argument is out of its range.

    state_dict: `frozen_codebook` [K, F], and `code_transform.weight` [D, F] or the state of `transform`, as in
    vector-quantize-pytorch 1.32.

    >>> layer = SimVQ(dim=4, codebook_size=8)
    >>> loss, quantized, perplexity, indices = layer(torch.randn(2, 4, 5, 5))
    >>> quantized.shape, indices.shape, layer.codebook.shape
    (torch.Size([2, 4, 5, 5]), torch.Size([2, 5, 5]), torch.Size([8, 4]))

    Source: Zhu et al. 2024, arXiv:2411.02038.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        commitment_cost: float = 0.25,
        *,
        frozen_dim: int | None = None,
        transform: nn.Module | None = None,
        gradient: Gradient = "straight_through",
        channel_last: bool = False,
    ) -> None:
        super().__init__(dim, codebook_size, frozen_dim, transform)
        check_at_least("commitment_cost", commitment_cost, 0)
        check_choice("gradient", gradient, GRADIENTS)
        self._commitment_cost = commitment_cost
        self._gradient = gradient
        self._channel_last = channel_last

    def reset_parameters(self) -> None:
        """Draw the frozen vectors anew and initialise the transform, as the constructor does; after `to_empty` too."""
        self._draw_frozen_codebook()
        for module in self.code_transform.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def forward(self, inputs: Tensor) -> SimVQOutput:
        """Quantize a map.

        Args:
            inputs: [B, D, *spatial], or [B, *spatial, D] with channel_last, float16, bfloat16 or float32.
        Returns:
            loss: scalar float32.
            quantized: shape, dtype and (where they are dense) strides of inputs.
            perplexity: scalar float32 in [1, K], of the codes that this batch is assigned to.
            indices: int64 [B, *spatial].
        Raises:
            ValueError: rank, D, dtype or device do not fit, or `transform` does not return [K, D].
        """
        codebook = self._checked_codebook()
        vectors = map_to_vectors("inputs", inputs, "codebook", codebook, self._channel_last)
        out = vector_quantize(vectors, codebook, gradient=self._gradient)
        return SimVQOutput(
            out.codebook_loss + self._commitment_cost * out.commitment_loss,
            vectors_to_map(out.quantized, inputs, self._channel_last),
            perplexity_of(out.counts),
            self._index_map(out.indices, inputs),
        )

    def encode(self, inputs: Tensor) -> Tensor:
        """Indices of the nearest codes, int64 [B, *spatial]; `inputs` as in `forward`."""
        codebook = self._checked_codebook()
        vectors = map_to_vectors("inputs", inputs, "codebook", codebook, self._channel_last)
        return self._index_map(nearest_code(vectors, codebook), inputs)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes at integer indices [B, *spatial], as a map [B, D, *spatial] ([B, *spatial, D] with channel_last).

        An index of -1 stands for no code and decodes to zeros.

        Raises:
            ValueError: no integers, no dimensions, or (on the CPU) an index lies outside [-1, K).
        """
        indices = long_indices(indices)
        if indices.ndim == 0:
            raise ValueError("expected indices of shape [B, *spatial], got (); pass indices[None]")
        return codes_to_map(gather_codes(self._checked_codebook(), indices), self._channel_last)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, codebook_size={self.codebook_size}, commitment_cost={self._commitment_cost},"
            f" frozen_dim={self.frozen_dim}, gradient={self._gradient!r}, channel_last={self._channel_last}"
        )

    def _index_map(self, indices: Tensor, inputs: Tensor) -> Tensor:
        return indices.view(spatial_shape(inputs, self._channel_last))

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import check_size
from .residual_vector_quantizer import ResidualVectorQuantizer, ResidualVectorQuantizerOutput


class GroupedResidualVectorQuantizer(nn.Module):
    """Residual vector quantizers of groups of channels: the map is divided in G parts of D / G channels.

    Args:
        num_groups: G.
        num_quantizers, num_embeddings, commitment_cost, options: of each group, as in `ResidualVectorQuantizer`.
        embedding_dim: D, the channels of the map, a multiple of G.
        channel_last: maps are [B, *spatial, D].
    Raises:
        ValueError: an argument is out of its range.

    state_dict: that of `ResidualVectorQuantizer` under `groups.{g}.`.

    >>> layer = GroupedResidualVectorQuantizer(2, num_quantizers=4, num_embeddings=8, embedding_dim=6)
    >>> loss, quantized, perplexity, indices = layer(torch.randn(2, 6, 50))
    >>> quantized.shape, perplexity.shape, indices.shape
    (torch.Size([2, 6, 50]), torch.Size([2, 4]), torch.Size([2, 50, 2, 4]))

    Source: Yang et al. 2023, arXiv:2305.02765, section 3.
    """

    def __init__(
        self,
        num_groups: int,
        num_quantizers: int,
        num_embeddings: int,
        embedding_dim: int,
        *,
        channel_last: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        num_groups = check_size("num_groups", num_groups, 1)
        embedding_dim = check_size("embedding_dim", embedding_dim, 1)
        if embedding_dim % num_groups:
            raise ValueError(
                f"expected embedding_dim to be a multiple of num_groups, got {embedding_dim} and {num_groups}"
            )
        self._channel_last = channel_last
        self.groups = nn.ModuleList(
            ResidualVectorQuantizer(
                num_quantizers, num_embeddings, embedding_dim // num_groups, channel_last=channel_last, **options
            )
            for _ in range(num_groups)
        )

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, *, num_levels: int | None = None
    ) -> ResidualVectorQuantizerOutput:
        """Quantize a map; arguments as in `ResidualVectorQuantizer.forward`.

        Returns:
            loss: scalar float32, the mean over the groups.
            quantized: shape and dtype of inputs.
            perplexity: [G, L] float32.
            indices: [B, *spatial, G, L].
        """
        parts = self._divide(inputs)
        outputs = [group(part, mask, num_levels=num_levels) for group, part in zip(self.groups, parts, strict=True)]
        loss, quantized, perplexity, indices = zip(*outputs, strict=True)
        return ResidualVectorQuantizerOutput(
            torch.stack(loss).mean(),
            torch.cat(quantized, dim=-1 if self._channel_last else 1),
            torch.stack(perplexity),
            torch.stack(indices, dim=-2),
        )

    def encode(self, inputs: Tensor, *, num_levels: int | None = None) -> Tensor:
        """Indices of the first `num_levels` levels (None: all), [B, *spatial, G, num_levels]."""
        parts = zip(self.groups, self._divide(inputs), strict=True)
        return torch.stack([group.encode(part, num_levels=num_levels) for group, part in parts], dim=-2)  # type: ignore[operator]

    def decode(self, indices: Tensor) -> Tensor:
        """The map of the codes at indices [B, *spatial, G, n]; see `ResidualVectorQuantizer.decode`."""
        if indices.ndim < 3 or indices.shape[-2] != len(self.groups):
            raise ValueError(
                f"expected indices of shape [B, *spatial, {len(self.groups)}, n], got {tuple(indices.shape)}"
            )
        parts = zip(self.groups, indices.unbind(-2), strict=True)
        codes = [group.decode(part) for group, part in parts]  # type: ignore[operator]
        return torch.cat(codes, dim=-1 if self._channel_last else 1)

    def _divide(self, inputs: Tensor) -> tuple[Tensor, ...]:
        dim = -1 if self._channel_last else 1
        expected = sum(group.embedding_dim for group in self.groups)  # type: ignore[misc]
        if inputs.ndim < 2 or inputs.shape[dim] != expected:
            shape = f"[B, ..., {expected}]" if self._channel_last else f"[B, {expected}, ...]"
            raise ValueError(f"expected inputs of shape {shape}, got {tuple(inputs.shape)}")
        return inputs.chunk(len(self.groups), dim)

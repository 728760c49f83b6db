from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import check_size, check_tensor
from .maps import features_last
from .residual_vector_quantizer import ResidualVectorQuantizer, ResidualVectorQuantizerOutput
from .usage import CodebookUsage


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

    @property
    def codebooks(self) -> Tensor:
        """The codes of all groups and levels, a copy [G, L, K, D / G]."""
        return torch.stack([group.codebooks for group in self._quantizers()])

    @property
    def usage(self) -> CodebookUsage:
        """How evenly the codes of each group and level are used, [G, L]."""
        return CodebookUsage(*map(torch.stack, zip(*(group.usage for group in self._quantizers()), strict=True)))

    def reset_parameters(self) -> None:
        """Initialise all groups anew, as the constructor does; call it after `to_empty`."""
        for group in self._quantizers():
            group.reset_parameters()

    def _quantizers(self) -> Iterator[ResidualVectorQuantizer]:
        return iter(self.groups)  # type: ignore[arg-type]

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
        # Quantizer dropout runs the same levels in all groups.
        levels = next(self._quantizers()).levels_to_run(num_levels)
        outputs = [group.quantize(part, mask, levels) for group, part in zip(self._quantizers(), parts, strict=True)]
        loss, quantized, perplexity, indices = zip(*outputs, strict=True)
        return ResidualVectorQuantizerOutput(
            torch.stack(loss).mean(),
            torch.cat(quantized, dim=-1 if self._channel_last else 1),
            torch.stack(perplexity),
            torch.stack(indices, dim=-2),
        )

    def encode(self, inputs: Tensor, *, num_levels: int | None = None) -> Tensor:
        """Indices of the first `num_levels` levels (None: all), [B, *spatial, G, num_levels]."""
        parts = zip(self._quantizers(), self._divide(inputs), strict=True)
        return torch.stack([group.encode(part, num_levels=num_levels) for group, part in parts], dim=-2)

    def decode(self, indices: Tensor) -> Tensor:
        """The map of the codes at indices [B, *spatial, G, n]; see `ResidualVectorQuantizer.decode`."""
        check_tensor("indices", indices)
        if indices.ndim < 3 or indices.shape[-2] != len(self.groups):
            raise ValueError(
                f"expected indices of shape [B, *spatial, {len(self.groups)}, n], got {tuple(indices.shape)}"
            )
        parts = zip(self._quantizers(), indices.unbind(-2), strict=True)
        codes = [group.decode(part) for group, part in parts]
        return torch.cat(codes, dim=-1 if self._channel_last else 1)

    def _divide(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The maps of the groups."""
        num_features = sum(group.embedding_dim for group in self._quantizers())
        features_last("inputs", inputs, num_features, self._channel_last)
        return inputs.chunk(len(self.groups), -1 if self._channel_last else 1)

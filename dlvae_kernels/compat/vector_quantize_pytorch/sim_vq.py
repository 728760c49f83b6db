from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...functional.gather_codes import gather_codes
from ...functional.vector_quantize import vector_quantize
from ...layers.maps import codes_to_map, long_indices
from ...layers.sim_vq import TransformedCodebook
from .layout import check_features, indices_to_map, to_map, to_sequence


class SimVQ(TransformedCodebook):
    """Vector quantizer whose codebook is a learned transform of frozen random vectors, as in vector-quantize-pytorch.

    loss = commitment_weight * (mean (q - sg[x])^2 + input_to_quantize_commit_loss_weight * mean (sg[q] - x)^2).
    The search, the transform and the loss are in float32 in half-precision modules and under autocast too.

    Args:
        dim: D, the features of the input.
        codebook_size: K, the number of codes.
        codebook_transform: a module that maps [K, F] to the codes [K, D]; by default `nn.Linear(F, D, bias=False)`.
        init_fn: a function of the frozen vectors [K, F], drawn from a normal distribution of variance 1 / F, that
            returns those to use.
        channel_first: inputs are [b, D, ...].
        rotation_trick: the gradient of quantized passes to the input by `rotation_trick`; straight-through without.
        input_to_quantize_commit_loss_weight: the weight of the term that moves the input.
        commitment_weight: the weight of the loss.
        frozen_codebook_dim: F, the features of the frozen vectors; by default D.
    Raises:
        ValueError: D, K or F is not positive.

    state_dict: `frozen_codebook` [K, F], and `code_transform.weight` [D, F] or the state of `codebook_transform`.

    >>> quantizer = SimVQ(dim=8, codebook_size=16)
    >>> quantized, indices, loss = quantizer(torch.randn(2, 10, 8))
    >>> quantized.shape, indices.shape, loss.shape
    (torch.Size([2, 10, 8]), torch.Size([2, 10]), torch.Size([]))
    >>> torch.equal(quantizer.indices_to_codes(indices), quantized)
    True

    Source: Zhu et al. 2024, arXiv:2411.02038.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] | None = None,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__(dim, codebook_size, frozen_codebook_dim, codebook_transform)
        if init_fn is not None:
            self.frozen_codebook = init_fn(self.frozen_codebook)
        self.channel_first = channel_first
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize vectors.

        Args:
            x: [b, ..., D], or [b, D, ...] with channel_first.
        Returns:
            quantized: shape and dtype of x; indices: int64 [b, ...]; loss: scalar float32.
        Raises:
            ValueError: the shape, dtype or device of x does not fit.
        """
        codebook = self._checked_codebook()
        vectors, spatial = self._sequence(x)
        out = vector_quantize(vectors, codebook, gradient="rotation" if self.rotation_trick else "straight_through")
        return (
            to_map(out.quantized, spatial, self.channel_first),
            indices_to_map(out.indices, spatial),
            self._loss(out.codebook_loss, out.commitment_loss),
        )

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes at integer indices [b, ...]: [b, ..., D], or [b, D, ...] with channel_first; zeros for -1."""
        return codes_to_map(gather_codes(self._checked_codebook(), long_indices(indices)), not self.channel_first)

    def _sequence(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        check_features(x, self.dim, self.channel_first)
        return to_sequence(x, self.channel_first)

    def _loss(self, codebook_loss: Tensor, commitment_loss: Tensor) -> Tensor:
        return (codebook_loss + commitment_loss * self.input_to_quantize_commit_loss_weight) * self.commitment_weight

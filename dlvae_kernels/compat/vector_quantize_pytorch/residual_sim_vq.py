from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...functional.gather_codes import gather_codes
from ...functional.residual_quantize import ResidualGradient, residual_decode, residual_quantize
from ...layers.maps import codes_to_map
from .layout import indices_to_map, to_map
from .levels import LevelDropout, padded_indices
from .sim_vq import SimVQ


class ResidualSimVQ(nn.Module):
    """Residual quantizer whose levels are `SimVQ`, as in vector-quantize-pytorch; all levels run in one operation.

    The gradient of quantized passes to the input once for each level that ran, so L-fold.

    Args:
        dim: D, the features of the input.
        num_quantizers: L, the number of levels.
        codebook_size: K, the number of codes of a level.
        heads: 1.
        quantize_dropout: run a random number of levels in each training step.
        quantize_dropout_cutoff_index: the first level that may be the last one to run.
        quantize_dropout_multiple_of: the number of levels that run is a multiple of this, or L.
        channel_first: inputs are [b, D, ...].
        rotation_trick: the gradient of each level is that of `rotation_trick`; straight-through without.
        sim_vq_kwargs: the other arguments of `SimVQ`. All levels share one `codebook_transform`.
    Raises:
        ValueError: heads is not 1, or a size or the cutoff is out of range.

    state_dict: `layers.{level}.` followed by the names of `SimVQ`.

    >>> quantizer = ResidualSimVQ(dim=8, num_quantizers=4, codebook_size=16)
    >>> quantized, indices, losses = quantizer(torch.randn(2, 10, 8))
    >>> quantized.shape, indices.shape, losses.shape
    (torch.Size([2, 10, 8]), torch.Size([2, 10, 4]), torch.Size([4]))
    >>> torch.equal(quantizer.get_output_from_indices(indices), quantized)
    True

    Sources: Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1; Zhu et al. 2024, arXiv:2411.02038.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs: Any,
    ) -> None:
        super().__init__()
        if heads != 1:
            raise ValueError(f"expected heads=1, since ResidualSimVQ has no heads, got {heads}")
        if num_quantizers < 1:
            raise ValueError(f"expected num_quantizers of at least 1, got {num_quantizers}")
        self.channel_first = channel_first
        self.num_quantizers = num_quantizers
        options = {"rotation_trick": rotation_trick, "channel_first": channel_first, **sim_vq_kwargs}
        self.layers = nn.ModuleList(SimVQ(dim, codebook_size, **options) for _ in range(num_quantizers))
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        if self.quantize_dropout:
            self._level_dropout()

    @property
    def codebook_size(self) -> int:
        """K."""
        return self._first.codebook_size

    @property
    def codebook_dim(self) -> int:
        """D."""
        return self._first.dim

    @property
    def codebooks(self) -> Tensor:
        """The codes [L, K, D], which have a gradient to the transforms."""
        return self._codebooks(self.num_quantizers)

    def forward(
        self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None
    ) -> tuple[Tensor, ...]:
        """Quantize vectors.

        Args:
            x: [b, ..., D], or [b, D, ...] with channel_first.
            return_all_codes: also return the code of each level.
            rand_quantize_dropout_fixed_seed: the seed of the number of levels that run in training.
        Returns:
            quantized: shape and dtype of x; indices: int64 [b, ..., L], -1 for a level that did not run; losses: [L]
            float32, 0 for a level that did not run; with return_all_codes also the result of `get_codes_from_indices`.
        Raises:
            ValueError: the shape, dtype or device of x does not fit.
        """
        vectors, spatial = self._first._sequence(x)
        levels: int | Tensor = self.num_quantizers
        if self.training and self.quantize_dropout:
            levels = self._level_dropout().levels_to_run(x.device, rand_quantize_dropout_fixed_seed)
        num_levels, flags = (self.num_quantizers, levels) if isinstance(levels, Tensor) else (levels, None)
        # The options of the loss are those of the first level: the constructor gives all levels the same.
        first, missing = self._first, self.num_quantizers - num_levels
        gradient: ResidualGradient = "rotation_each" if first.rotation_trick else "each"
        out = residual_quantize(vectors, self._codebooks(num_levels), levels=flags, gradient=gradient)
        quantized = to_map(out.quantized, spatial, self.channel_first)
        indices = indices_to_map(pad(out.indices, (0, missing), value=-1), spatial)
        losses = pad(first._loss(out.codebook_loss, out.commitment_loss), (0, missing))
        if not return_all_codes:
            return quantized, indices, losses
        return quantized, indices, losses, self.get_codes_from_indices(indices)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The code of each level: [L, b, ..., D], or [L, b, D, ...] with channel_first.

        Args:
            indices: integers [b, ..., l] of the first l <= L levels; zeros where an index is -1 or a level is missing.
        """
        codes = gather_codes(self.codebooks, padded_indices(indices, self.num_quantizers)).movedim(-2, 0)
        return codes.movedim(-1, 2) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The sum of the codes of all levels, in the layout of the input; `indices` as in `get_codes_from_indices`."""
        return codes_to_map(
            residual_decode(self.codebooks, padded_indices(indices, self.num_quantizers)), not self.channel_first
        )

    @property
    def _first(self) -> SimVQ:
        return cast(SimVQ, self.layers[0])

    def _codebooks(self, num_levels: int) -> Tensor:
        # The transform of a level that does not run gets no gradient, so that an optimizer leaves it as it is.
        levels = cast(list[SimVQ], list(self.layers)[:num_levels])
        return torch.stack([level._checked_codebook() for level in levels])

    def _level_dropout(self) -> LevelDropout:
        return LevelDropout(self.num_quantizers, self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of)

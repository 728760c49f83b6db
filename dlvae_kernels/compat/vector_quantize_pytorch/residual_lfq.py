"""Residual lookup-free quantization under the names of vector-quantize-pytorch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ...functional.checks import check_floating, check_size
from ...layers.maps import long_indices
from ...layers.projection import project, zeros_where_masked
from .grouped import GroupedResidual
from .layout import check_features
from .levels import LevelDropout
from .lookup_free_quantization import LFQ, valid_vectors


class ResidualLFQ(nn.Module):
    """L lookup-free quantizers, each of what those before it left, with the interface of vector-quantize-pytorch 1.32.

    Level i has codes of -2^-i and 2^-i. As there, each level is straight-through, so the gradient of quantized with
    respect to x is L times the identity (without projections). What differs, beside the differences of `LFQ`:

    - Decoding is the inverse of encoding with spherical and orthogonal_rotation too, for maps too, and for the first
      levels alone with or without quantize_dropout.
    - Maps work with projections, with quantizer dropout, and in both layouts.
    - A position where all indices are -1 decodes to zeros.

    Args:
        dim: D, the features of x; linear layers project to the log2(codebook_size) features of a code and back if
            they differ.
        num_quantizers: L.
        quantize_dropout: in train mode with gradients enabled, the last levels are left out, a random number of them.
        quantize_dropout_cutoff_index: the first level that may be the last one to run.
        quantize_dropout_multiple_of: the number of levels that run is a multiple of this, or L.
        soft_clamp_input_value: that of the first level; each level has half of the one before.
        channel_first: the layout of maps; None: channels come first in x of 4 or more dimensions.
        kwargs: arguments of `LFQ`.
    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is unknown.

    state_dict: `layers.{i}.mask` [d] int64 and, with orthogonal_rotation, `layers.{i}.orthogonal_rot`;
    `project_in.*` and `project_out.*` where there is a projection.

    >>> quantizer = ResidualLFQ(dim=16, codebook_size=256, num_quantizers=4)
    >>> quantized, indices, losses = quantizer(torch.randn(2, 50, 16))
    >>> quantized.shape, indices.shape, losses.shape
    (torch.Size([2, 50, 16]), torch.Size([2, 50, 4]), torch.Size([4]))
    >>> quantizer.get_output_from_indices(indices[..., :2]).shape
    torch.Size([2, 50, 16])

    Source: Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1; Yu et al. 2023, arXiv:2310.05737; interface:
    lucidrains, vector-quantize-pytorch.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
        channel_first: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.dim = check_size("dim", dim, 1)
        self.num_quantizers = check_size("num_quantizers", num_quantizers, 1)
        self.channel_first = channel_first
        self.layers = nn.ModuleList(
            LFQ(
                codebook_size=codebook_size,
                codebook_scale=2**-level,
                soft_clamp_input_value=None if soft_clamp_input_value is None else soft_clamp_input_value * 2**-level,
                channel_first=False,
                **kwargs,
            )
            for level in range(self.num_quantizers)
        )
        first = self._levels[0]
        if first.has_projections or first.num_codebooks > 1:
            raise ValueError(
                "expected levels of one codebook without projections, got has_projections="
                f"{first.has_projections} and num_codebooks={first.num_codebooks}; leave these arguments out"
            )
        self.has_projections = first.codebook_dim != self.dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, first.codebook_dim)
            self.project_out = nn.Linear(first.codebook_dim, self.dim)
        self.quantize_dropout = quantize_dropout and self.num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        if self.quantize_dropout:
            self._dropout = LevelDropout(
                self.num_quantizers, quantize_dropout_cutoff_index, quantize_dropout_multiple_of
            )

    @property
    def codebooks(self) -> Tensor:
        """The codes of all levels, [L, K, d]."""
        return torch.stack([layer.codebook for layer in self._levels])

    @property
    def drops_levels(self) -> bool:
        """Whether a forward now leaves out a random number of levels."""
        return self.training and self.quantize_dropout and torch.is_grad_enabled()

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of each level, not projected, [L, b, *spatial, d]; zeros for the index -1 and missing levels.

        Args:
            indices: integers [b, *spatial, n] of the first n <= L levels.
        Raises:
            ValueError: no integers, or more than L levels.
        """
        indices = long_indices(indices)
        if indices.ndim < 2 or not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"expected indices of shape [b, ..., n] with n in [1, {self.num_quantizers}],"
                f" got {tuple(indices.shape)}"
            )
        levels = zip(self._levels, indices.unbind(-1), strict=False)
        codes = [layer.indices_to_codes(index, project_out=False) for layer, index in levels]
        codes += [torch.zeros_like(codes[0])] * (self.num_quantizers - len(codes))
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The sum of the codes of all levels, projected, in the layout of `forward`; indices as it returns them."""
        # The order of this sum is that of `forward`, which makes them equal.
        total = sum(self.get_codes_from_indices(indices).unbind(0))
        assert isinstance(total, Tensor)
        is_code = (indices >= 0).any(-1)
        if self._levels[0].keep_num_codebooks_dim:
            is_code = is_code.squeeze(-1)
        output = zeros_where_masked(project(self.project_out, total), is_code).to(total.dtype)
        return output.movedim(-1, 1) if self._has_channels_first(output.ndim) else output

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize vectors or a map.

        Args:
            x: [b, n, D], [b, D], or a map [b, D, *spatial]; with channel_first=False [b, *spatial, D].
            mask: as in `LFQ`.
            return_all_codes: return the codes of each level too.
            rand_quantize_dropout_fixed_seed: seed of quantizer dropout; by default random and the same on all ranks.
        Returns:
            quantized: shape and dtype of x.
            indices: int64 [b, *spatial, L], -1 where a level did not run.
            losses: float32 [L], 0 where a level did not run.
            codes: [L, b, *spatial, d], with return_all_codes.
        Raises:
            ValueError: shape, dtype or mask do not fit.
        """
        check_floating("x", x)
        channel_first = self._has_channels_first(x.ndim)
        check_features(x, self.dim, channel_first)
        vectors = x.movedim(1, -1) if channel_first else x
        valid = None if mask is None else valid_vectors(mask, vectors)
        runs: int | Tensor = self.num_quantizers
        if self.drops_levels:
            runs = self._dropout.levels_to_run(x.device, rand_quantize_dropout_fixed_seed)
        num_run = runs if isinstance(runs, int) else self.num_quantizers
        residual = project(self.project_in, vectors.to(torch.promote_types(x.dtype, torch.float32)))
        total, all_indices, losses = torch.zeros_like(residual), [], []
        for level, layer in enumerate(self._levels[:num_run]):
            quantized, indices, loss = layer(residual, mask=valid)
            if isinstance(runs, Tensor):
                quantized = torch.where(runs[level], quantized, 0)
                indices, loss = torch.where(runs[level], indices, -1), torch.where(runs[level], loss, 0)
            residual = residual - quantized.detach()
            total = total + quantized
            all_indices.append(indices)
            losses.append(loss)
        num_left = self.num_quantizers - num_run
        all_indices += [torch.full_like(all_indices[0], -1)] * num_left
        losses += [torch.zeros_like(losses[0])] * num_left
        output = project(self.project_out, total).to(x.dtype)
        if channel_first:
            output = output.movedim(-1, 1)
        result = output, torch.stack(all_indices, -1), torch.stack(losses)
        return (*result, self.get_codes_from_indices(result[1])) if return_all_codes else result

    @property
    def _levels(self) -> list[LFQ]:
        return cast(list[LFQ], list(self.layers))

    def _has_channels_first(self, num_dims: int) -> bool:
        return num_dims >= 4 if self.channel_first is None else self.channel_first


class GroupedResidualLFQ(GroupedResidual):
    """Splits the features into groups and quantizes each with a `ResidualLFQ` of its own; interface as in 1.32.

    Unlike in vector-quantize-pytorch, maps work with projections and quantizer dropout, and decode in their layout.

    Args:
        dim: D, the features of x, a multiple of groups.
        groups: G.
        accept_image_fmap: x is [b, D, *spatial] in place of [b, ..., D].
        kwargs: arguments of `ResidualLFQ` beside dim and channel_first.
    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is unknown.

    state_dict: `rvqs.{g}.` followed by the names of `ResidualLFQ`.

    >>> quantizer = GroupedResidualLFQ(dim=16, groups=2, codebook_size=256, num_quantizers=4, accept_image_fmap=True)
    >>> quantized, indices, losses = quantizer(torch.randn(2, 16, 5, 6))
    >>> quantized.shape, indices.shape, losses.shape
    (torch.Size([2, 16, 5, 6]), torch.Size([2, 2, 5, 6, 4]), torch.Size([2, 4]))
    >>> quantizer.get_output_from_indices(indices).shape
    torch.Size([2, 16, 5, 6])

    Source: Yang et al. 2023, arXiv:2305.02765; interface: lucidrains, vector-quantize-pytorch.
    """

    quantizer = ResidualLFQ

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        kwargs["channel_first"] = accept_image_fmap
        super().__init__(dim, groups, accept_image_fmap, accept_image_fmap, kwargs)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_all_codes: bool = False
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Quantize vectors or a map.

        Args:
            x: [b, ..., D], or [b, D, *spatial] with accept_image_fmap.
            mask: as in `LFQ`.
            return_all_codes: return the codes of each level too.
        Returns:
            quantized: shape and dtype of x.
            indices: int64 [G, b, *spatial, L], -1 where a level did not run; the same levels run in all groups.
            losses: float32 [G, L].
            codes: a tuple of [L, b, *spatial, d] for each group, with return_all_codes.
        Raises:
            ValueError: shape, dtype or mask do not fit.
        """
        quantized, indices, losses, *codes = self._outputs(x, mask=mask, return_all_codes=return_all_codes)
        return self._joined(quantized), torch.stack(indices), torch.stack(losses), *codes

"""The base of the grouped residual quantizers: features in groups with a quantizer each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...functional.checks import check_size
from .layout import check_features
from .levels import draw_seed


class GroupedResidual(nn.Module):
    """Divides the features into groups of equal size and quantizes each by a `quantizer` of its own."""

    quantizer: ClassVar[type[nn.Module]]

    def __init__(
        self, dim: int, groups: int, accept_image_fmap: bool, is_channel_first: bool, kwargs: dict[str, Any]
    ) -> None:
        super().__init__()
        self.dim = check_size("dim", dim, 1)
        self.groups = check_size("groups", groups, 1)
        if self.dim % self.groups:
            raise ValueError(f"expected dim to be a multiple of groups={self.groups}, got {self.dim}")
        self.accept_image_fmap = accept_image_fmap
        # The layout of the inputs of the groups.
        self.is_channel_first = is_channel_first
        self.rvqs = nn.ModuleList(self.quantizer(dim=self.dim // self.groups, **kwargs) for _ in range(self.groups))

    @property
    def codebooks(self) -> Tensor:
        """The codes of all groups and levels, a copy [G, L, K, D]."""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])  # type: ignore[misc]

    @property
    def split_dim(self) -> int:
        """The dimension of the features, which the groups divide."""
        return 1 if self.accept_image_fmap or self.is_channel_first else -1

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of each group and level, [G, L, b, *spatial, D], of indices [G, b, *spatial, n]."""
        parts = zip(self.rvqs, self._of_groups(indices), strict=True)
        return torch.stack([rvq.get_codes_from_indices(part) for rvq, part in parts])  # type: ignore[operator]

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` for its indices [G, b, *spatial, n], in its layout."""
        parts = zip(self.rvqs, self._of_groups(indices), strict=True)
        return self._joined([rvq.get_output_from_indices(part) for rvq, part in parts])  # type: ignore[operator]

    def _outputs(self, x: Tensor, indices: Sequence[Tensor] | None = None, **options: Any) -> list[tuple[Tensor, ...]]:
        """The outputs of the groups, those of one kind together; the same levels run in all groups.

        Args:
            indices: of each group, for its argument `indices`.
            options: of all groups.
        """
        check_features(x, self.dim, self.split_dim == 1, "accept_image_fmap")
        if self.rvqs[0].drops_levels:
            seed = draw_seed(x.device)
            options["rand_quantize_dropout_fixed_seed"] = seed if torch.compiler.is_compiling() else int(seed)
        parts = x.movedim(self.split_dim, self._channel).chunk(self.groups, self._channel)
        of_each = [{}] * self.groups if indices is None else [{"indices": each} for each in indices]
        outputs = [rvq(part, **each, **options) for rvq, part, each in zip(self.rvqs, parts, of_each, strict=True)]
        return list(zip(*outputs, strict=True))

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The maps of the groups as one."""
        return torch.cat(tuple(parts), self._channel).movedim(self._channel, self.split_dim)

    @property
    def _channel(self) -> int:
        """The dimension of the features in the inputs of the groups."""
        return 1 if self.is_channel_first else -1

    def _of_groups(self, indices: Tensor) -> Tensor:
        if indices.ndim == 0 or len(indices) != self.groups:
            raise ValueError(f"expected indices of shape [{self.groups}, b, ..., n], got {tuple(indices.shape)}")
        return indices

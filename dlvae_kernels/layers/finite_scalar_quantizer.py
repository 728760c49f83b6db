from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional.checks import check_same_device, check_size
from .implicit_codebook_layer import ImplicitCodebookLayer
from .maps import check_index_dtype

# The bound exceeds the outermost levels by this fraction, so that a finite feature is assigned to them.
_MARGIN = 1e-3
# With more levels, the margin would be wider than half a level.
_MOST_LEVELS = 1000


class FiniteScalarQuantizerOutput(NamedTuple):
    """The result of `FiniteScalarQuantizer`, whose `forward` describes the fields.

    >>> FiniteScalarQuantizerOutput._fields
    ('quantized', 'indices')
    """

    quantized: Tensor
    indices: Tensor


class FiniteScalarQuantizer(ImplicitCodebookLayer):
    """Finite scalar quantizer (FSQ): each feature is bounded by tanh and rounded to one of a few levels.

    The product of the levels is the size K of the codebook, which is never stored. There is no loss and no state: the
    gradient passes through the bound, and through the rounding unchanged.

    Args:
        levels: the number of levels of each feature of a code, at least 3 and at most 1000; with preserve_symmetry
            at least 2.
        dim: D, the channels of the map; by default len(levels) * num_codebooks. For another D, linear projections
            `project_in` and `project_out` are learned.
        num_codebooks: C, the number of codes of a position, each of len(levels) features and with an index of its own.
        preserve_symmetry: levels at equal distances in [-1, 1], whose middle is 0 for even numbers of levels too;
            without it, even numbers of levels have the values -1, ..., 1 - 2 / L.
        projection_bias: the projections have biases.
        index_dtype: torch.uint16, torch.int32 or torch.int64.
        channel_last: maps are [B, *spatial, D].
    Raises:
        ValueError: an argument is out of its range, or K indices do not fit into index_dtype.

    state_dict: `project_in.weight` [C * len(levels), D], `project_out.weight` [D, C * len(levels)] and, with
    projection_bias, `project_in.bias` and `project_out.bias`; empty without projections. Names, shapes and order of
    the codes are those of vector-quantize-pytorch 1.32.

    >>> layer = FiniteScalarQuantizer([8, 5, 5, 5], dim=16)
    >>> quantized, indices = layer(torch.randn(2, 16, 4, 4))
    >>> layer.codebook_size, quantized.shape, indices.shape, indices.dtype
    (1000, torch.Size([2, 16, 4, 4]), torch.Size([2, 4, 4]), torch.int32)
    >>> torch.allclose(layer.decode(indices), quantized, atol=1e-6)
    True

    Source: Mentzer et al. 2023, arXiv:2309.15505; preserve_symmetry: Parker et al. 2024, arXiv:2411.19842, section 3.2.
    """

    _levels: Tensor
    _places: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        *,
        num_codebooks: int = 1,
        preserve_symmetry: bool = False,
        projection_bias: bool = True,
        index_dtype: torch.dtype = torch.int32,
        channel_last: bool = False,
    ) -> None:
        self.levels = tuple(check_size("each of levels", level, 2) for level in levels)
        if not self.levels:
            raise ValueError("expected levels of at least one feature, got none")
        if not preserve_symmetry and not (min(self.levels) > 2 and max(self.levels) <= _MOST_LEVELS):
            raise ValueError(
                f"expected each of levels in [3, {_MOST_LEVELS}], got {self.levels}; pass preserve_symmetry=True"
            )
        super().__init__(dim, len(self.levels), num_codebooks, projection_bias, channel_last)
        check_index_dtype(index_dtype, self.codebook_size)
        self._preserve_symmetry = preserve_symmetry
        self._index_dtype = index_dtype
        self.register_buffer("_levels", torch.empty(len(self.levels), dtype=torch.int64), persistent=False)
        self.register_buffer("_places", torch.empty(len(self.levels), dtype=torch.int64), persistent=False)
        self.register_load_state_dict_post_hook(_leave_meta)
        self._fill_buffers()

    @property
    def codebook_size(self) -> int:
        """K, the number of codes of one codebook: the product of the levels."""
        return math.prod(self.levels)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._fill_buffers()

    def forward(self, inputs: Tensor) -> FiniteScalarQuantizerOutput:
        """Quantize a map.

        Args:
            inputs: [B, D, *spatial], or [B, *spatial, D] with channel_last, float16, bfloat16, float32 or float64; with
                projections, their dtype or half precision.
        Returns:
            quantized: shape and dtype of inputs. Without projections these are codes in [-1, 1].
            indices: [B, *spatial], or [B, *spatial, C] for several codebooks, of index_dtype. The first level has
                the lowest place value.
        A feature that is NaN stays NaN, and counts as the first level in the index.
        Raises:
            ValueError: rank, D, dtype or device do not fit.
        """
        bounded = self._bounded(self._split(self._as_vectors(inputs)))
        level = self._level(bounded.detach())
        # The sum is exactly the code, and has the gradient of the bounded feature.
        half = self._half_width(bounded.dtype)
        codes = (level - half) / half + (bounded - bounded.detach()) / half
        return FiniteScalarQuantizerOutput(self._merge(codes, inputs), self._index_map(self._index(level), inputs))

    def _fill_buffers(self) -> None:
        places = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        self._levels.copy_(torch.tensor(self.levels))
        self._places.copy_(torch.tensor(places))

    def _half_width(self, dtype: torch.dtype) -> Tensor:
        """Half of the distance between the levels with codes -1 and 1, in levels, one number for each feature."""
        half = (self._levels - 1) / 2 if self._preserve_symmetry else self._levels // 2
        return half.to(dtype)

    def _bounded(self, x: Tensor) -> Tensor:
        """The features in units of levels, relative to the level whose code is 0."""
        check_same_device("inputs", x, "the layer", self._levels)
        if self._preserve_symmetry:
            return x.tanh() * self._half_width(x.dtype)
        bound = (self._levels - 1).to(x.dtype) * ((1 + _MARGIN) / 2)
        # For an even number of levels the interval reaches half a level farther down than up, and x = 0 has code 0.
        offset = (self._levels % 2 == 0).to(x.dtype) / 2
        return (x + (offset / bound).atanh()).tanh() * bound - offset

    def _level(self, bounded: Tensor) -> Tensor:
        """The nearest level, from 0, as a floating number."""
        return (bounded + (self._half_width(bounded.dtype) + 0.5)).floor()

    def _index(self, level: Tensor) -> Tensor:
        # From 2^24 levels on, float32 rounds the last level up.
        number = torch.minimum(level.nan_to_num(0).long(), self._levels - 1)
        return (number * self._places).sum(-1).to(self._index_dtype)

    def _indices_of(self, x: Tensor) -> Tensor:
        return self._index(self._level(self._bounded(x.detach())))

    def _codes_at(self, indices: Tensor) -> Tensor:
        level = indices[..., None] // self._places % self._levels
        half = self._half_width(torch.float32)
        return (level - half) / half

    def _arguments(self) -> dict[str, object]:
        return {
            "levels": self.levels,
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "preserve_symmetry": self._preserve_symmetry,
            "projection_bias": self._projection_bias,
            "index_dtype": self._index_dtype,
            "channel_last": self._channel_last,
        }


def _leave_meta(module: FiniteScalarQuantizer, incompatible_keys: object) -> None:
    """Make the buffers anew, which no checkpoint holds, if load_state_dict has assigned tensors to a meta module."""
    weight = next(module.parameters(), None)
    if module._levels.is_meta and weight is not None and not weight.is_meta:
        for name in ("_levels", "_places"):
            setattr(module, name, torch.empty_like(getattr(module, name), device=weight.device))
        module._fill_buffers()

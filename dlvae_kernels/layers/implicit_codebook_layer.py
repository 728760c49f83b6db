"""Base of the quantizers whose codebook is a formula: projections, layouts, and indices of several codebooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.checks import check_floating, check_layer_dtype, check_same_device, check_size
from .maps import check_index_range, codes_to_map, features_last, long_indices, spatial_shape, vectors_to_map
from .projection import project, zeros_where_masked


class ImplicitCodebookLayer(nn.Module):
    """Base of the quantizers that compute a code from its index instead of storing a codebook.

    A vector of `dim` features becomes `num_codebooks` vectors of `code_dim` features, by a linear projection where the
    numbers of features differ; each of these has an index of its own, and the codes are projected back. A subclass
    defines `_codes_at` and `_indices_of`.

    The computation ignores autocast and is in float32 or wider, projections included.
    """

    def __init__(
        self, dim: int | None, code_dim: int, num_codebooks: int, projection_bias: bool, channel_last: bool
    ) -> None:
        super().__init__()
        self.num_codebooks = check_size("num_codebooks", num_codebooks, 1)
        self.code_dim = code_dim
        width = code_dim * self.num_codebooks
        self.dim = width if dim is None else check_size("dim", dim, 1)
        self._projection_bias = projection_bias
        self._channel_last = channel_last
        has_projections = self.dim != width
        self.project_in = nn.Linear(self.dim, width, bias=projection_bias) if has_projections else nn.Identity()
        self.project_out = nn.Linear(width, self.dim, bias=projection_bias) if has_projections else nn.Identity()

    @property
    def codebook_size(self) -> int:
        """K, the number of codes of one codebook."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise all parameters and buffers anew, as the constructor does; call it after `to_empty`."""
        for projection in (self.project_in, self.project_out):
            if isinstance(projection, nn.Linear):
                projection.reset_parameters()

    def encode(self, inputs: Tensor) -> Tensor:
        """The indices of a map; `inputs` and the result as in `forward`."""
        return self._index_map(self._indices_of(self._split(self._as_vectors(inputs))), inputs)

    def decode(self, indices: Tensor) -> Tensor:
        """The map of indices, float32 or in the dtype of the projections.

        Args:
            indices: as `forward` returns them, of any integer dtype; -1 stands for no code: it decodes to zeros,
                which, beside other codebooks, are projected with their codes.
        Raises:
            ValueError: dtype or shape do not fit, or (on the CPU, outside graphs) an index lies outside [-1, K).
        """
        indices = long_indices(indices)
        trailing = () if self.num_codebooks == 1 else (self.num_codebooks,)
        if indices.ndim < 1 + len(trailing) or indices.shape[indices.ndim - len(trailing) :] != trailing:
            expected = "[B, *spatial]" if self.num_codebooks == 1 else f"[B, *spatial, {self.num_codebooks}]"
            raise ValueError(f"expected indices of shape {expected}, got {tuple(indices.shape)}")
        indices = indices.view(*indices.shape[: indices.ndim - len(trailing)], self.num_codebooks)
        check_index_range(indices, self.codebook_size)
        is_code = indices >= 0
        codes = torch.where(is_code[..., None], self._codes_at(indices), 0)
        decoded = project(self.project_out, codes.flatten(-2))
        decoded = zeros_where_masked(decoded, is_code.any(-1))
        if isinstance(self.project_out, nn.Linear):
            decoded = decoded.to(self.project_out.weight.dtype)
        return codes_to_map(decoded, self._channel_last)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())

    def _arguments(self) -> dict[str, object]:
        """The arguments of the constructor, by name."""
        raise NotImplementedError

    def _indices_of(self, x: Tensor) -> Tensor:
        """The indices of x [..., C, code_dim]: integers [..., C]."""
        raise NotImplementedError

    def _codes_at(self, indices: Tensor) -> Tensor:
        """The codes at int64 indices [..., C], where those below 0 may have any: [..., C, code_dim]."""
        raise NotImplementedError

    def _as_vectors(self, inputs: Tensor) -> Tensor:
        """Check a map and view it as vectors [B, S, dim], or [B, *spatial, dim]."""
        vectors = features_last("inputs", inputs, self.dim, self._channel_last)
        check_floating("inputs", vectors)
        if isinstance(self.project_in, nn.Linear):
            check_layer_dtype("inputs", vectors, self.project_in.weight)
            check_same_device("inputs", vectors, "project_in.weight", self.project_in.weight)
        return vectors

    def _split(self, vectors: Tensor) -> Tensor:
        """Project vectors [..., dim] to those of each codebook, in float32 or wider: [..., C, code_dim]."""
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        return project(self.project_in, vectors.to(dtype)).unflatten(-1, (self.num_codebooks, self.code_dim))

    def _merge(self, codes: Tensor, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Project codes [..., C, code_dim] back, to a map with the shape and dtype of `inputs`; what is masked is 0."""
        vectors = project(self.project_out, codes.flatten(-2)).to(inputs.dtype)
        return vectors_to_map(zeros_where_masked(vectors, mask), inputs, self._channel_last)

    def _index_map(self, indices: Tensor, inputs: Tensor) -> Tensor:
        """Indices [..., C] as [B, *spatial], followed by C if there are several codebooks."""
        trailing = () if self.num_codebooks == 1 else (self.num_codebooks,)
        return indices.reshape(*spatial_shape(inputs, self._channel_last), *trailing)

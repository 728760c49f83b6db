"""Finite scalar quantization."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...functional.autocast import without_autocast
from ...functional.checks import check_between, check_floating, check_size
from ...layers.maps import check_index_range, long_indices
from ...layers.projection import project, zeros_where_masked

# Without preserve_symmetry, the bound exceeds the outermost levels by a fraction of 1e-3; with more levels, that is
# half a level or more.
_MOST_LEVELS = 1000


class FSQ(nn.Module):
    """Finite scalar quantizer with the interface of vector-quantize-pytorch 1.32.

    Each feature is bounded and rounded to one of a few levels; the gradient passes through the bound, and through the
    rounding unchanged. The product of the levels is the size K of the codebook, which is never stored.

    Differences from vector-quantize-pytorch: autocast is ignored and projections compute in float32 or wider, so that
    neither changes an index; indices are exact for every K; the index -1 decodes to zeros; inputs may be [n, dim].

    Args:
        levels: the number of levels of each feature of a code, at least 3, or 2 with preserve_symmetry.
        dim: the features of an input, by default those of the codes; for another number linear projections are learned.
        num_codebooks: c, the number of codes of a position, each with an index of its own.
        keep_num_codebooks_dim: indices have a last dimension of size c, by default if c > 1.
        scale: has no effect.
        allowed_dtypes: inputs of other dtypes are quantized in float32, with force_quantization_f32.
        channel_first: inputs of two and three dimensions are channel-first, too.
        projection_has_bias: the projections have biases.
        return_indices: without it, `forward` returns None in place of indices.
        force_quantization_f32: see allowed_dtypes.
        preserve_symmetry: levels at equal distances in [-1, 1]; without it, even numbers of levels have the values
            -1, ..., 1 - 2 / L.
        noise_dropout: the probability with which a feature is moved by uniform noise in [-1/2, 1/2] in training;
            needs preserve_symmetry. vector-quantize-pytorch 1.32 takes 1/2 for every value above 0.
        bound_hard_clamp: clamp a feature to [-1, 1] in place of tanh.
        orthogonal_rotation: rotate the features by a random matrix before the quantization, and back after it.
    Raises:
        ValueError: an argument is out of its range, or K indices do not fit into int32.

    state_dict: `project_in.weight` [c * len(levels), dim], `project_out.weight` [dim, c * len(levels)], their biases,
    and `orthogonal_rot` [len(levels), len(levels)] with orthogonal_rotation; empty otherwise.

    >>> quantizer = FSQ(levels=[8, 5, 5, 5])
    >>> quantized, indices = quantizer(torch.randn(1, 1024, 4))
    >>> quantizer.codebook_size, quantized.shape, indices.shape, indices.dtype
    (1000, torch.Size([1, 1024, 4]), torch.Size([1, 1024]), torch.int32)
    >>> torch.equal(quantized, quantizer.indices_to_codes(indices))
    True

    Source: Mentzer et al. 2023, arXiv:2309.15505; preserve_symmetry and noise_dropout: Parker et al. 2024,
    arXiv:2411.19842; orthogonal_rotation: Chee et al. 2023, arXiv:2307.13304.
    """

    _levels: Tensor
    _basis: Tensor
    _steps: Tensor
    _half_width: Tensor
    _offset: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        self._sizes = tuple(check_size("each of levels", level, 2) for level in levels)
        self.codebook_size = math.prod(self._sizes)
        self.codebook_dim = len(self._sizes)
        self.num_codebooks = check_size("num_codebooks", num_codebooks, 1)
        self.effective_codebook_dim = self.codebook_dim * self.num_codebooks
        self.dim = self.effective_codebook_dim if dim is None else check_size("dim", dim, 1)
        self.keep_num_codebooks_dim = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        self.scale = scale
        self.allowed_dtypes = allowed_dtypes
        self.channel_first = channel_first
        self.return_indices = return_indices
        self.force_quantization_f32 = force_quantization_f32
        self.preserve_symmetry = preserve_symmetry
        self.noise_dropout = noise_dropout
        self.bound_hard_clamp = bound_hard_clamp
        self.orthogonal_rotation = orthogonal_rotation
        self._check_arguments()
        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.effective_codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.effective_codebook_dim, self.dim, bias=projection_has_bias)
        for name, values in self._constants(torch.get_default_device()).items():
            self.register_buffer(name, values, persistent=False)
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", torch.empty(self.codebook_dim, self.codebook_dim))
            nn.init.orthogonal_(self.orthogonal_rot)

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes [K, len(levels)] in the order of their indices, not rotated; computed whenever it is read."""
        indices = torch.arange(self.codebook_size, device=self._levels.device)
        return self._scale_and_shift_inverse(self.indices_to_level_indices(indices), torch.float32)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantize vectors or maps.

        Args:
            z: [b, n, dim] or [n, dim], or with channel_first [b, dim, n] or [b, dim]; with four or more dimensions
                [b, dim, *spatial].
        Returns:
            quantized: shape and dtype of z.
            indices: int32 [b, n] or [b, *spatial], followed by c with keep_num_codebooks_dim. The first level has the
                lowest place value. None without return_indices.
        Raises:
            ValueError: z is not floating, or has not dim features.
        """
        is_map = self.channel_first or z.ndim >= 4
        check_floating("z", z)
        if z.shape[1 if is_map else -1] != self.dim:
            expected = f"[b, {self.dim}, ...]" if is_map else f"[b, n, {self.dim}]"
            remedy = "four or more dimensions are channel-first, others with channel_first=True"
            raise ValueError(f"expected z of shape {expected}, got {tuple(z.shape)}; {remedy}")
        vectors = self._widened(z.movedim(1, -1) if is_map else z)
        with without_autocast(z):
            vectors = project(self.project_in, vectors).unflatten(-1, (self.num_codebooks, self.codebook_dim))
            codes, output = self._encode(vectors)
            indices = self.codes_to_indices(codes.detach()) if self.return_indices else None
            quantized = project(self.project_out, output.flatten(-2)).to(z.dtype)
        if indices is not None and not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        return quantized.movedim(-1, 1) if is_map else quantized, indices

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The vectors or maps of indices as `forward` returns them, projected back; -1 stands for no code.

        They are float32, or in the dtype of the projections. A code of the index -1 is zeros, and so is the result
        where a position has no code.

        Raises:
            ValueError: the indices are no integers, their last dimension is not c with keep_num_codebooks_dim, or (on
                the CPU, outside graphs) an index lies outside [-1, K).
        """
        is_map = self.channel_first or indices.ndim >= 3 + self.keep_num_codebooks_dim
        if not self.keep_num_codebooks_dim:
            indices = indices.unsqueeze(-1)
        elif indices.shape[-1] != self.num_codebooks:
            raise ValueError(f"expected indices of shape [..., {self.num_codebooks}], got {tuple(indices.shape)}")
        codes = self._rotate_back(self._indices_to_codes(indices)).flatten(-2)
        vectors = project_codes(self.project_out, codes, (indices >= 0).any(-1))
        return vectors.movedim(-1, 1) if is_map else vectors

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The level of each feature of the codes at indices [...]: [..., len(levels)]."""
        return indices.unsqueeze(-1) // self._basis % self._levels

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """The int32 indices [...] of codes [..., len(levels)] in [-1, 1]; NaN counts as the first level.

        Raises:
            ValueError: the codes have not len(levels) features.
        """
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(f"expected codes of shape [..., {self.codebook_dim}], got {tuple(zhat.shape)}")
        level = ((zhat + 1) * self._half_width).round().nan_to_num(0).long()
        return (level * self._basis).sum(-1).to(torch.int32)

    def quantize(self, z: Tensor) -> Tensor:
        """The codes of features [..., len(levels)], with the gradient of the bound."""
        bound = self.symmetry_preserving_bound if self.preserve_symmetry else self.bound
        return bound(z, hard_clamp=self.bound_hard_clamp)

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """The codes of features without preserve_symmetry; the bound exceeds the levels by the fraction eps."""
        position = self._bounded(z, eps, hard_clamp)
        return _straight_through(position, position.round()) / self._half_width

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """The codes of features with preserve_symmetry."""
        steps = self._steps.to(torch.promote_types(z.dtype, torch.float32))
        position = steps * (_squash(hard_clamp)(z) + 1) / 2 + 0.5
        return 2 / steps * _straight_through(position, position.floor()) - 1

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """In training with noise_dropout, codes of which some features are moved, clamped to [-1, 1]."""
        if not self.training or self.noise_dropout == 0:
            return bounded_z
        is_moved = torch.empty_like(bounded_z).bernoulli_(self.noise_dropout).bool()
        noise = torch.rand_like(bounded_z) - 0.5
        return torch.where(is_moved, bounded_z + noise, bounded_z).clamp(-1, 1)

    def _bounded(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """Features in units of levels, relative to the level whose code is 0."""
        bound = self._steps.to(torch.promote_types(z.dtype, torch.float32)) * (1 + eps) / 2
        # For an even number of levels the interval reaches half a level farther down than up, and z = 0 has code 0.
        offset = self._offset.to(bound.dtype)
        shift = offset / bound if hard_clamp else (offset / bound).atanh()
        return _squash(hard_clamp)(z + shift) * bound - offset

    def _widened(self, vectors: Tensor) -> Tensor:
        is_allowed = not self.force_quantization_f32 or vectors.dtype in self.allowed_dtypes
        return vectors if is_allowed else vectors.float()

    def _encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of projected features [..., len(levels)], and those of the output: with noise, rotated back."""
        if self.orthogonal_rotation:
            vectors = vectors @ self.orthogonal_rot.to(vectors.dtype)
        codes = self.quantize(vectors)
        return codes, self._rotate_back(self.maybe_apply_noise(codes))

    def _scale_and_shift_inverse(self, level: Tensor, dtype: torch.dtype) -> Tensor:
        """The codes of levels [..., len(levels)], by the operations of `quantize`."""
        if self.preserve_symmetry:
            return level * (2 / self._steps.to(dtype)) - 1
        half_width = self._half_width.to(dtype)
        return (level - half_width) / half_width

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes [..., len(levels)] of indices [...], neither rotated back nor projected; zeros at -1."""
        # Division of int64 is slow.
        indices = indices if indices.dtype == torch.int32 else long_indices(indices)
        check_index_range(indices, self.codebook_size)
        weight = getattr(self.project_out, "weight", self._levels)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        codes = self._scale_and_shift_inverse(self.indices_to_level_indices(indices), dtype)
        return zeros_where_masked(codes, indices >= 0)

    def _rotate_back(self, codes: Tensor) -> Tensor:
        if not self.orthogonal_rotation:
            return codes
        with without_autocast(codes):
            return codes @ self.orthogonal_rot.to(codes.dtype).T

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FSQ:
        """Move or convert the module; `to_empty` leaves the buffers that no checkpoint holds as they were."""
        super()._apply(fn, recurse)
        for name, values in self._constants(self._levels.device).items():
            setattr(self, name, values)
        return self

    def _constants(self, device: torch.device) -> dict[str, Tensor]:
        """The buffers that no checkpoint holds, for each feature; the floating ones stay float32.

        They are the levels, its place value in an index, the distances from the first level to the last one and between
        the codes 0 and 1, in levels, and the offset that makes 0 a level.
        """
        levels = torch.tensor(self._sizes, dtype=torch.int32, device=device)
        places = torch.tensor([1, *self._sizes[:-1]], device=device).cumprod(0, dtype=torch.int32)
        return {
            "_levels": levels,
            "_basis": places,
            "_steps": (levels - 1).float(),
            "_half_width": (levels - 1).float() / 2 if self.preserve_symmetry else (levels // 2).float(),
            "_offset": (levels % 2 == 0).float() / 2,
        }

    def _check_arguments(self) -> None:
        if not self._sizes:
            raise ValueError("expected levels of at least one feature, got none")
        if not self.preserve_symmetry and 2 in self._sizes:
            raise ValueError(
                f"expected each of levels to be at least 3, got {self._sizes}; pass preserve_symmetry=True"
            )
        if self.num_codebooks > 1 and not self.keep_num_codebooks_dim:
            raise ValueError(f"expected keep_num_codebooks_dim=True with {self.num_codebooks} codebooks, got False")
        check_between("noise_dropout", self.noise_dropout, 0, 1)
        if self.noise_dropout > 0 and not self.preserve_symmetry:
            raise ValueError("expected preserve_symmetry=True with noise_dropout, got False")
        if self.return_indices and self.codebook_size > 2**31:
            raise ValueError(
                f"expected levels of at most {2**31} codes for int32 indices, got {self.codebook_size};"
                " pass return_indices=False or fewer levels"
            )
        if self.return_indices and not self.preserve_symmetry and max(self._sizes) > _MOST_LEVELS:
            raise ValueError(
                f"expected each of levels to be at most {_MOST_LEVELS}, got {self._sizes}; pass preserve_symmetry=True"
            )
        if self.orthogonal_rotation and len(set(self._sizes)) > 1:
            warnings.warn("orthogonal_rotation mixes features of unequal numbers of levels", stacklevel=3)


def project_codes(projection: nn.Module, codes: Tensor, is_coded: Tensor) -> Tensor:
    """Decoded codes, projected in float32 or wider, in the dtype of the projection; zeros where is_coded is False."""
    if not isinstance(projection, nn.Linear):
        return codes
    return zeros_where_masked(project(projection, codes), is_coded).to(projection.weight.dtype)


def _squash(hard_clamp: bool) -> Callable[[Tensor], Tensor]:
    """The function that maps a feature into [-1, 1]."""
    return (lambda z: z.clamp(-1, 1)) if hard_clamp else torch.tanh


def _straight_through(position: Tensor, level: Tensor) -> Tensor:
    """The level, exactly, with the gradient of the position."""
    return position + (level - position).detach()

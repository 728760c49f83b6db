"""Residual finite scalar quantization, also in groups of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...functional.autocast import without_autocast
from ...functional.checks import check_choice, check_floating, check_size
from ...layers.projection import project
from .finite_scalar_quantization import FSQ, project_codes
from .grouped import GroupedResidual
from .layout import check_features, indices_to_map, to_map, to_sequence
from .levels import LevelDropout

_NEWEST = "1.26"


class ResidualFSQ(nn.Module):
    """Residual finite scalar quantizer with the interface of vector-quantize-pytorch 1.32.

    Each level quantizes what the levels before it have left over, on a finer grid. Each of L levels passes the gradient
    straight through, so that the input has about L times the gradient of the output.

    Differences from vector-quantize-pytorch: the computation is in float32 or wider whatever autocast says; indices are
    int32 with dropped levels, too; all layouts of `forward` are decoded, also with orthogonal_rotation, and fewer than
    L levels without quantize_dropout; inputs may be [b, *spatial, dim]; the number of levels is drawn on the CPU.

    Args:
        levels: the number of levels of each feature of a code, of every quantizer.
        num_quantizers: L.
        dim: the features of an input, by default len(levels); for another number linear projections are learned.
        is_channel_first: inputs are [b, dim, *spatial].
        quantize_dropout: in training, run a random number of levels.
        quantize_dropout_cutoff_index: the first level that may be the last one to run.
        quantize_dropout_multiple_of: the number of levels that run is a multiple of this, or L.
        soft_clamp_input_value: s, one number or one for each feature: inputs x become s tanh(x / s).
        bound_hard_clamp: clamp a residual to [-1, 1] in place of tanh, and the input softly by
            s = 1 + 1 / (levels - 1); by default only in semantics "1.26".
        preserve_symmetry: as in `FSQ`; always in semantics "1.26", never in "1.18", by default not in "1.25".
        semantics: the versions of vector-quantize-pytorch whose indices and codes these are: "1.18" for 1.14.41 to
            1.18.1, "1.25" for 1.19.5 to 1.25.2, "1.26" for 1.26.0 to 1.32.0. Weights and tokens of a model keep their
            meaning only in the versions that trained it.
        kwargs: other arguments of `FSQ`, but num_codebooks, channel_first and return_indices.
    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument is out of its range, or did not exist in the versions of semantics.

    state_dict: `project_in.weight` [len(levels), dim], `project_out.weight` [dim, len(levels)], their biases, and
    `layers.{i}.orthogonal_rot` with orthogonal_rotation; empty otherwise.

    >>> quantizer = ResidualFSQ(dim=256, levels=[8, 5, 5, 3], num_quantizers=8).eval()
    >>> quantized, indices = quantizer(torch.randn(1, 1024, 256))
    >>> quantized.shape, indices.shape, indices.dtype
    (torch.Size([1, 1024, 256]), torch.Size([1, 1024, 8]), torch.int32)
    >>> torch.equal(quantized, quantizer.get_output_from_indices(indices))
    True

    Source: Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1, with the quantizer of arXiv:2309.15505.
    """

    scales: Tensor
    soft_clamp_input_value: Tensor | None

    def __init__(
        self,
        *,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | Sequence[float] | Tensor | None = None,
        bound_hard_clamp: bool | None = None,
        preserve_symmetry: bool | None = None,
        semantics: str = _NEWEST,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        is_newest = semantics == _NEWEST
        bound_hard_clamp = is_newest if bound_hard_clamp is None else bound_hard_clamp
        preserve_symmetry = is_newest if preserve_symmetry is None else preserve_symmetry
        has_soft_clamp = soft_clamp_input_value is not None
        _check_semantics(semantics, bound_hard_clamp, preserve_symmetry, has_soft_clamp)
        if bound_hard_clamp and has_soft_clamp:
            raise ValueError("expected no soft_clamp_input_value with bound_hard_clamp; pass bound_hard_clamp=False")
        for name in ("num_codebooks", "channel_first", "return_indices"):
            if name in kwargs:
                raise ValueError(f"expected no {name} in a residual quantizer, got {kwargs[name]!r}")
        self.levels = levels
        self.semantics = semantics
        self.num_quantizers = check_size("num_quantizers", num_quantizers, 1)
        self.is_channel_first = is_channel_first
        codebook_dim = len(levels)
        self.dim = codebook_dim if dim is None else check_size("dim", dim, 1)
        self.has_projections = self.dim != codebook_dim
        self.project_in = nn.Linear(self.dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, self.dim) if self.has_projections else nn.Identity()
        self.layers = nn.ModuleList(
            FSQ(levels, preserve_symmetry=preserve_symmetry, bound_hard_clamp=bound_hard_clamp, **kwargs)
            for _ in range(num_quantizers)
        )
        self.codebook_size = self._layer(0).codebook_size
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        if self.quantize_dropout:
            self._dropout = LevelDropout(num_quantizers, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        # Values on the CPU, of which the buffers are copies in float32 or wider.
        sizes = torch.tensor(levels, dtype=torch.float32, device="cpu")
        base = sizes if is_newest else sizes - 1
        self._values = {"scales": torch.stack([base**-i for i in range(num_quantizers)])}
        if bound_hard_clamp:
            self._values["soft_clamp_input_value"] = 1 + 1 / (sizes - 1)
        elif soft_clamp_input_value is not None:
            self._values["soft_clamp_input_value"] = torch.as_tensor(
                soft_clamp_input_value, dtype=torch.float32, device="cpu"
            )
        for name in ("scales", "soft_clamp_input_value"):
            value = self._values.get(name)
            buffer = None if value is None else value.to(torch.get_default_device(), copy=True)
            self.register_buffer(name, buffer, persistent=False)

    @property
    def codebooks(self) -> Tensor:
        """The codes [L, K, len(levels)] of all levels, not scaled; computed whenever they are read."""
        return torch.stack([self._layer(i).implicit_codebook for i in range(self.num_quantizers)])

    def forward(
        self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Quantize vectors or maps.

        Args:
            x: [b, *spatial, dim], or [b, dim, *spatial] with is_channel_first.
            return_all_codes: also return the codes of all levels.
            rand_quantize_dropout_fixed_seed: decides how many levels run, in place of a random number.
        Returns:
            quantized: shape and dtype of x.
            indices: int32 [b, *spatial, L], or [b, L, *spatial] with is_channel_first; -1 for a dropped level.
            all_codes, with return_all_codes: see `get_codes_from_indices`.
        Raises:
            ValueError: x is not floating, or has not dim features.
        """
        check_floating("x", x)
        check_features(x, self.dim, self.is_channel_first, "is_channel_first")
        vectors, spatial = to_sequence(x, self.is_channel_first)
        residual = project(self.project_in, vectors.to(torch.promote_types(x.dtype, torch.float32)))
        if self.soft_clamp_input_value is not None:
            residual = (residual / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        if self.semantics == "1.18":
            residual = self._layer(0)._bounded(residual)
        runs: int | Tensor = self.num_quantizers
        if self.drops_levels:
            runs = self._dropout.levels_to_run(x.device, rand_quantize_dropout_fixed_seed)
        num_levels = runs if isinstance(runs, int) else self.num_quantizers
        quantized = torch.zeros_like(residual)
        first, all_codes = self._layer(0), []
        with without_autocast(x):
            for i, scale in enumerate(self.scales[:num_levels].unbind(0)):
                codes, output = self._layer(i)._encode(first._widened(residual / scale))
                output = output.to(residual.dtype) * scale
                if isinstance(runs, Tensor):
                    output = torch.where(runs[i], output, 0)
                residual = residual - output.detach()
                quantized = quantized + output
                all_codes.append(codes.detach())
        indices = first.codes_to_indices(torch.stack(all_codes, -2))
        if isinstance(runs, Tensor):
            indices = torch.where(runs, indices, -1)
        if first.keep_num_codebooks_dim:
            indices = indices.unsqueeze(-2)
        output = to_map(project(self.project_out, quantized).to(x.dtype), spatial, self.is_channel_first)
        stacked = pad(indices, (0, self.num_quantizers - num_levels), value=-1)
        stacked = indices_to_map(stacked, spatial)
        stacked = stacked.movedim(-1, 1) if self.is_channel_first else stacked
        return (output, stacked, self.get_codes_from_indices(stacked)) if return_all_codes else (output, stacked)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The scaled codes [L, b, *spatial, len(levels)] of all levels; -1 and absent levels have zeros.

        Args:
            indices: as `forward` returns them, of the first n <= L levels.
        Raises:
            ValueError: the indices are no integers, of more than L levels, or (on the CPU, outside graphs) outside
                [-1, codebook_size).
        """
        indices = self._with_levels_last(indices)
        levels = self._layer(0)._indices_to_codes(indices).unbind(-2)
        codes = [self._layer(i)._rotate_back(each) * self.scales[i] for i, each in enumerate(levels)]
        return torch.stack([*codes, *[torch.zeros_like(codes[0])] * (self.num_quantizers - len(codes))])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` for indices as in `get_codes_from_indices`.

        It is float32, or in the dtype of the projections. A position without a code has zeros.
        """
        codes = self.get_codes_from_indices(indices)
        # The order of the sum is that of `forward`, and so are the bits of the result.
        total = sum(codes.unbind(0), torch.zeros_like(codes[0]))
        vectors = project_codes(self.project_out, total, (self._with_levels_last(indices) >= 0).any(-1))
        return vectors.movedim(-1, 1) if self.is_channel_first else vectors

    def _layer(self, index: int) -> FSQ:
        layer = self.layers[index]
        assert isinstance(layer, FSQ)
        return layer

    @property
    def drops_levels(self) -> bool:
        return self.training and self.quantize_dropout and torch.is_grad_enabled()

    def _with_levels_last(self, indices: Tensor) -> Tensor:
        """Check indices and view them as [b, *spatial, n]."""
        shape = indices.shape
        indices = indices.movedim(1 if self.is_channel_first else -1, -1)
        if indices.ndim < 2 or not 1 <= indices.shape[-1] <= self.num_quantizers:
            expected = "[b, n, ...]" if self.is_channel_first else "[b, ..., n]"
            raise ValueError(
                f"expected indices of shape {expected} with n in [1, {self.num_quantizers}], got {tuple(shape)}"
            )
        return indices.squeeze(-2) if self._layer(0).keep_num_codebooks_dim else indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidualFSQ:
        """Move or convert the module; the buffers that no checkpoint holds stay float32 or wider."""
        super()._apply(fn, recurse)
        for name, value in self._values.items():
            buffer = getattr(self, name)
            setattr(self, name, value.to(buffer.device, torch.promote_types(buffer.dtype, torch.float32), copy=True))
        return self


class GroupedResidualFSQ(GroupedResidual):
    """Groups of features with a `ResidualFSQ` each, with the interface of vector-quantize-pytorch 1.32.

    Differences from vector-quantize-pytorch: maps are quantized with accept_image_fmap alone and with is_channel_first
    alone, and decoded.

    Args:
        dim: the features of an input.
        groups: g, which divides dim.
        accept_image_fmap: inputs are [b, dim, *spatial].
        is_channel_first: inputs are [b, dim, *spatial], and the levels of indices come before the spatial dimensions.
        kwargs: arguments of `ResidualFSQ`, semantics among them.
    Raises:
        ValueError: groups do not divide dim, or `ResidualFSQ` raises.

    state_dict: `rvqs.{i}.` with the names of `ResidualFSQ`.

    >>> quantizer = GroupedResidualFSQ(dim=64, groups=2, levels=[5, 5, 5, 5], num_quantizers=2)
    >>> quantized, indices = quantizer(torch.randn(1, 100, 64))
    >>> quantized.shape, indices.shape
    (torch.Size([1, 100, 64]), torch.Size([2, 1, 100, 2]))

    Source: Yang et al. 2023, arXiv:2305.02765, with `ResidualFSQ` as the quantizer.
    """

    quantizer = ResidualFSQ

    def __init__(
        self,
        *,
        dim: int,
        groups: int = 1,
        accept_image_fmap: bool = False,
        is_channel_first: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs["is_channel_first"] = is_channel_first
        super().__init__(dim, groups, accept_image_fmap, is_channel_first, kwargs)
        self.codebook_size = self.rvqs[0].codebook_size

    def forward(self, x: Tensor, return_all_codes: bool = False) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Quantize vectors or maps.

        Args:
            x: [b, *spatial, dim], or [b, dim, *spatial] with accept_image_fmap or is_channel_first.
            return_all_codes: also return the codes of all levels.
        Returns:
            quantized: shape and dtype of x.
            indices: int32 [g, b, *spatial, L], or [g, b, L, *spatial] with is_channel_first; -1 for a dropped level.
            all_codes, with return_all_codes: a tuple of [L, b, *spatial, len(levels)] of each group.
        Raises:
            ValueError: x has not dim features.
        """
        quantized, indices, *codes = self._outputs(x, return_all_codes=return_all_codes)
        return self._joined(quantized), torch.stack(indices), *codes


def _check_semantics(semantics: str, bound_hard_clamp: bool, preserve_symmetry: bool, has_soft_clamp: bool) -> None:
    """Refuse arguments that did not exist in the versions of `semantics`, or had one value only."""
    check_choice("semantics", semantics, ("1.18", "1.25", _NEWEST))
    if semantics == _NEWEST and not preserve_symmetry:
        raise ValueError(f'expected preserve_symmetry=True in semantics "{_NEWEST}", got False')
    unknown = {
        "bound_hard_clamp": bound_hard_clamp and semantics != _NEWEST,
        "preserve_symmetry": preserve_symmetry and semantics == "1.18",
        "soft_clamp_input_value": has_soft_clamp and semantics == "1.18",
    }
    for name, is_unknown in unknown.items():
        if is_unknown:
            raise ValueError(f'expected no {name} in semantics "{semantics}", whose versions lack it')

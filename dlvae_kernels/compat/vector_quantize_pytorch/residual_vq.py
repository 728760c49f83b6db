"""ResidualVQ and GroupedResidualVQ: levels that quantize what the levels before them left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...functional.checks import check_floating, check_size
from ...functional.gather_codes import gather_codes
from ...functional.residual_quantize import ResidualGradient, residual_decode, residual_quantize
from ...layers.codebook import is_recomputed
from ...layers.projection import project, zeros_where_masked
from ...layers.usage import CodebookUsage
from .arguments import REFUSED, check_arguments
from .codebook import codes_like, loss_of_both
from .grouped import GroupedResidual
from .layout import check_features, indices_to_map, to_masked_map, to_sequence
from .level_codebooks import learn_levels, own_storage, stacked
from .levels import LevelDropout, padded_indices
from .vector_quantize_pytorch import VectorQuantize


class ResidualVQ(nn.Module):
    """Residual vector quantizer with the arguments, results and state of vector-quantize-pytorch 1.32.

    Where all levels have codebooks of one size that are compared by distance, they run in one operation. The gradient
    of the output to the input is that of each level, so L-fold, as in the source; the residual has none
    (`quant_grad_frac=0`).

    Args:
        dim: the features of the input.
        num_quantizers: L, the number of levels; by default the number of codebook sizes.
        codebook_size: K, or a tuple with that of each level.
        codebook_dim: the features of a code, by default `dim`, with linear layers around all levels where it differs.
        shared_codebook: all levels have one codebook.
        quantize_dropout: in training, a random number of levels runs, above `quantize_dropout_cutoff_index`, and a
            multiple of `quantize_dropout_multiple_of`.
        accept_image_fmap: inputs are maps [b, dim, *spatial].
        quant_grad_frac: the share of the gradient of a level that reaches the levels before it.
        vq_kwargs: of every level, as in `VectorQuantize`.
    Raises:
        TypeError: an argument is not implemented, or unknown.
        ValueError: an argument is out of its range.

    state_dict: that of `VectorQuantize` under `layers.{i}.`, and `project_in.*` and `project_out.*`.

    >>> layer = ResidualVQ(dim=16, num_quantizers=4, codebook_size=32)
    >>> quantized, indices, losses = layer(torch.randn(2, 50, 16))
    >>> quantized.shape, indices.shape, losses.shape
    (torch.Size([2, 50, 16]), torch.Size([2, 50, 4]), torch.Size([4]))
    >>> layer.eval().get_output_from_indices(indices[..., :2]).shape
    torch.Size([2, 50, 16])

    Source: Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        refused = {name: vq_kwargs.pop(name) for name in REFUSED["ResidualVQ"] if name in vq_kwargs}
        check_arguments("ResidualVQ", refused)
        if heads != 1:
            raise ValueError(f"expected heads=1 in a residual quantizer, got {heads}; GroupedResidualVQ has groups")
        if num_quantizers is None and not isinstance(codebook_size, tuple):
            raise ValueError("expected num_quantizers, or codebook_size as a tuple, got neither")
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * int(num_quantizers or 0)
        if num_quantizers is not None and len(sizes) != num_quantizers:
            raise ValueError(f"expected codebook_size of {num_quantizers} levels, got {sizes}")
        self.num_quantizers = check_size("num_quantizers", len(sizes), 1)
        self.codebook_sizes = sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        if shared_codebook and not self.uniform_codebook_size:
            raise ValueError(f"expected one codebook_size with shared_codebook=True, got {sizes}")
        self.dim = check_size("dim", dim, 1)
        self.codebook_dim = self.dim if codebook_dim is None else check_size("codebook_dim", codebook_dim, 1)
        self.has_projections = self.codebook_dim != self.dim
        self.project_in = nn.Linear(self.dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, self.dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap = accept_image_fmap
        self._is_channel_first = accept_image_fmap or not vq_kwargs.pop("channel_last", True)
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.quant_grad_frac = quant_grad_frac
        self.shared_codebook = shared_codebook
        if shared_codebook:
            vq_kwargs["manual_ema_update"] = True
        # The levels get sequences, whatever the layout of the input.
        self.layers = nn.ModuleList(VectorQuantize(self.codebook_dim, size, **vq_kwargs) for size in sizes)
        if self._level(0).has_projections:
            raise ValueError("expected codebook_dim of the residual quantizer, which projects once for all levels")
        for layer in self._levels():
            if shared_codebook:
                layer._codebook = self._level(0)._codebook
            else:
                layer._codebook.register_state_dict_pre_hook(own_storage)
        # Recomputation under activation checkpointing takes the path of the last forward.
        self._was_fused = False
        self.quantize_dropout = quantize_dropout and self.num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self._dropout = LevelDropout(self.num_quantizers, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)

    def _levels(self) -> Iterator[VectorQuantize]:
        return iter(self.layers)  # type: ignore[arg-type]

    def _level(self, level: int) -> VectorQuantize:
        return self.layers[level]  # type: ignore[return-value]

    @property
    def codebook_size(self) -> int:
        """K, the number of codes of the first level."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codes of all levels, a copy [L, K, D]; a tuple of [K, D] where their sizes differ."""
        codebooks = tuple(layer._codebook.embed[0] for layer in self._levels())
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    @property
    def drops_levels(self) -> bool:
        """Whether a forward now leaves out a random number of levels."""
        return self.training and self.quantize_dropout

    @property
    def usage(self) -> CodebookUsage:
        """How evenly the codes of each level are used, [L]."""
        levels = [layer.usage for layer in self._levels()]
        return CodebookUsage(*(torch.cat([part.reshape(1) for part in parts]) for parts in zip(*levels, strict=True)))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | Tensor | None = None,
    ) -> Any:
        """Quantize vectors.

        Args:
            x: [b, n, dim], with accept_image_fmap maps [b, dim, *spatial].
            mask: [b, n] ([b, *spatial]) bool: True for a valid vector.
            indices: [b, n, L], or a list of [b, n]: return the cross-entropy to these codes.
            return_all_codes: also return the codes of all levels, [L, b, n, D].
            rand_quantize_dropout_fixed_seed: of quantizer dropout, for the same levels on all ranks.
        Returns:
            (quantized, indices, losses): quantized as x; indices [b, n, L] ([b, *spatial, L]) int64, -1 where masked or
            a level did not run; losses [L], 0 in eval mode. With `indices` (quantized, cross-entropy).
        Raises:
            ValueError: a shape, dtype or device does not fit; nothing has been changed.
        """
        check_arguments("ResidualVQ.forward", {"beam_size": beam_size})
        check_floating("x", x)
        check_features(x, self.dim, self._is_channel_first, "accept_image_fmap")
        sequence, spatial = to_sequence(x, self._is_channel_first)
        valid = None if mask is None else mask.reshape(sequence.shape[:2])
        vectors = sequence
        if self.has_projections:
            vectors = project(self.project_in, zeros_where_masked(sequence, valid))
        levels: int | Tensor = self.num_quantizers
        if self.drops_levels and indices is None:
            levels = self._dropout.levels_to_run(x.device, rand_quantize_dropout_fixed_seed)
        if indices is None and self._is_fused(sample_codebook_temp):
            quantized, found, losses = self._quantize(vectors, valid, levels, freeze_codebook)
        else:
            targets = indices if indices is None or isinstance(indices, Tensor) else torch.stack(list(indices), -1)
            # A level that is frozen itself stays so.
            options = {"sample_codebook_temp": sample_codebook_temp, "freeze_codebook": freeze_codebook or None}
            count = levels if isinstance(levels, int) else int(levels.sum())
            quantized, found, losses = self._quantize_by_level(vectors, valid, count, targets, options)
        output, zeros = project(self.project_out, quantized), self.return_zeros_for_masked_padding
        output = to_masked_map(output, sequence, valid, zeros, spatial, self._is_channel_first)
        if indices is not None:
            return output, losses.sum()
        found = indices_to_map(found, spatial)
        return (
            (output, found, losses, self.get_codes_from_indices(found)) if return_all_codes else (output, found, losses)
        )

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of all levels at indices [b, ..., n] of the first n levels: [L, b, ..., D]; -1 gives zeros."""
        indices = padded_indices(indices, self.num_quantizers)
        if self.uniform_codebook_size:
            return gather_codes(self._stacked(), indices).movedim(-2, 0)
        parts = zip(self.codebooks, indices.unbind(-1), strict=True)
        return torch.stack([gather_codes(codes, index) for codes, index in parts])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` for its indices, or for those of the first levels, in its layout."""
        if self.uniform_codebook_size:
            codes = residual_decode(self._stacked(), padded_indices(indices, self.num_quantizers))
        else:
            codes = self.get_codes_from_indices(indices).sum(0)
        output = zeros_where_masked(project(self.project_out, codes), (indices >= 0).any(-1))
        return output.movedim(-1, 1) if self._is_channel_first else output

    def _stacked(self) -> Tensor:
        """The codebooks of all levels, [L, K, D]: a copy in training, since a step changes them."""
        if self.shared_codebook:
            return self._level(0)._codebook.embed.repeat(self.num_quantizers, 1, 1)
        return stacked([layer._codebook.embed for layer in self._levels()], is_changed=self.training)

    def _is_fused(self, temperature: float | None) -> bool:
        """Whether all levels can run in one operation."""
        if is_recomputed():
            return self._was_fused
        layer = self._level(0)
        temperature = layer.sample_codebook_temp if temperature is None else temperature
        is_fused = (
            self.uniform_codebook_size
            and self.quant_grad_frac == 0
            and not layer.use_cosine_sim
            and not (self.training and layer.stochastic_sample_codes and temperature > 0)
            and layer.orthogonal_reg_weight == layer.codebook_diversity_loss_weight == 0
            and not (self.training and any(level._codebook.is_uninitialised for level in self._levels()))
        )
        if not torch.compiler.is_compiling():
            self._was_fused = is_fused
        return is_fused

    def _quantize(
        self, vectors: Tensor, valid: Tensor | None, levels: int | Tensor, is_frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized vectors, indices and losses of the levels that run, in one operation."""
        first = self._level(0)
        codebooks = codes_like(self._stacked(), vectors)
        gradient: ResidualGradient = "rotation_each" if first.rotation_trick else "each"
        out = residual_quantize(vectors, codebooks, levels=levels, mask=valid, gradient=gradient)
        quantized = out.quantized
        if not (self.training and vectors.requires_grad and first.route_gradients_to_input):
            has_gradient = codebooks.requires_grad and torch.is_grad_enabled()
            quantized = residual_decode(codebooks, out.indices) if has_gradient else quantized.detach()
        count = 1 if self.shared_codebook else levels if isinstance(levels, int) else self.num_quantizers
        used = [layer._codebook for layer in self._levels()][:count]
        is_frozen = is_frozen or first.freeze_codebook
        updates = [codebook.begin(vectors.numel(), _no_codes, is_frozen) for codebook in used]
        if updates[0] and used[0].is_tracked:
            learn_levels(used, vectors.detach(), out.indices, codebooks.detach(), levels, valid, self.shared_codebook)
        losses = torch.zeros_like(out.commitment_loss)
        if self.training and first.commitment_weight > 0:
            learns = first.learnable_codebook and not is_frozen
            losses = (loss_of_both(out) if learns else out.commitment_loss) * first.commitment_weight
        return quantized, out.indices, losses

    def _quantize_by_level(
        self,
        vectors: Tensor,
        valid: Tensor | None,
        num_levels: int,
        targets: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized vectors, indices and losses of all levels; with targets [..., L] the losses are cross-entropies."""
        residual, quantized = vectors, torch.zeros_like(vectors)
        indices: list[Tensor] = []
        losses: list[Tensor] = []
        residuals: list[Tensor] = []
        for level, layer in enumerate(self._levels()):
            if level >= num_levels:
                indices.append(torch.full_like(indices[0], -1))
                losses.append(torch.zeros_like(losses[0]))
                continue
            residuals.append(residual)
            target = None if targets is None else targets[..., level].reshape(vectors.shape[:2])
            codes, *found = layer(residual, mask=valid, indices=target, **options)
            indices.append(found[0] if target is None else target)
            losses.append(found[-1])
            share = self.quant_grad_frac
            residual = residual - (codes.detach() if share <= 0 else share * codes + (1 - share) * codes.detach())
            quantized = quantized + codes
        shared = self._level(0)
        if self.training and self.shared_codebook and not (options["freeze_codebook"] or shared.freeze_codebook):
            if shared.ema_update:
                shared._codebook.update_ema()
            shared.expire_codes_(torch.cat(residuals, 1).detach())
        return quantized, torch.stack(indices, -1), torch.stack(losses)


def _no_codes() -> NoReturn:
    raise AssertionError("the codebooks of fused levels are initialised")


class GroupedResidualVQ(GroupedResidual):
    """Residual vector quantizers of groups of features, with the interface of vector-quantize-pytorch 1.32.

    Args:
        dim: the features of the input, a multiple of `groups`.
        groups: G.
        accept_image_fmap: inputs are maps [b, dim, *spatial].
        kwargs: of each group, as in `ResidualVQ`.
    Raises:
        TypeError: an argument is not implemented, or unknown.
        ValueError: an argument is out of its range.

    state_dict: that of `ResidualVQ` under `rvqs.{g}.`.

    >>> layer = GroupedResidualVQ(dim=16, groups=2, num_quantizers=4, codebook_size=32)
    >>> quantized, indices, losses = layer(torch.randn(2, 50, 16))
    >>> quantized.shape, indices.shape, losses.shape
    (torch.Size([2, 50, 16]), torch.Size([2, 2, 50, 4]), torch.Size([2, 4]))

    Source: Yang et al. 2023, arXiv:2305.02765, section 3.
    """

    quantizer = ResidualVQ

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        is_channel_first = accept_image_fmap or not kwargs.get("channel_last", True)
        kwargs["accept_image_fmap"] = accept_image_fmap
        super().__init__(dim, groups, accept_image_fmap, is_channel_first, kwargs)

    def forward(
        self,
        x: Tensor,
        indices: Sequence[Tensor] | Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """Quantize vectors; arguments as in `ResidualVQ.forward`, with indices of every group.

        Returns:
            (quantized, indices, losses): indices [G, b, n, L], losses [G, L]; with return_all_codes the codes of each
            group, a tuple of [L, b, n, D]. With `indices` (quantized, cross-entropy).
        Raises:
            ValueError: a shape, dtype or device does not fit.
        """
        check_floating("x", x)
        if indices is not None and len(indices) not in (0, self.groups):
            raise ValueError(f"expected indices of {self.groups} groups, got {len(indices)}")
        targets = None if indices is None or len(indices) == 0 else list(indices)
        quantized, *others = self._outputs(
            x,
            targets,
            mask=mask,
            return_all_codes=return_all_codes,
            sample_codebook_temp=sample_codebook_temp,
            freeze_codebook=freeze_codebook,
        )
        joined = self._joined(quantized)
        if targets is not None:
            return joined, torch.stack(others[0]).sum()
        found, losses, *codes = others
        return joined, torch.stack(found), torch.stack(losses), *codes

"""VectorQuantize: one codebook, or one for each head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...functional.autocast import without_autocast
from ...functional.checks import check_at_least, check_floating, check_same_device, check_size
from ...functional.gather_codes import gather_codes
from ...functional.vector_quantize import Gradient, VectorQuantizeOutput, vector_quantize
from ...layers.projection import project, to_unit_length, zeros_where_masked
from ...layers.usage import CodebookUsage
from .arguments import check_arguments
from .codebook import Codebook, EmaWeight, codes_like, loss_of_both, quantize_at
from .layout import check_features, indices_to_map, to_masked_map, to_sequence
from .regularization import diversity_loss, orthogonal_loss


class LossBreakdown(NamedTuple):
    """The terms of the loss of `VectorQuantize` without their weights, scalars; `inplace_optimize` is always 0.

    >>> LossBreakdown._fields
    ('commitment', 'codebook_diversity', 'orthogonal_reg', 'inplace_optimize')
    """

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """Vector quantizer with the arguments, results and state of vector-quantize-pytorch 1.32.

    All names keep their meaning; docs/vector-quantize-pytorch.md lists each argument, and what is mended: masks with
    heads and projections, decoding in every layout, float32 statistics in half-precision modules, k-means that never
    runs in eval mode and leaves no empty clusters, no value read from the device in a step.

    Args:
        dim: the features of the input.
        codebook_size: K, the number of codes.
        codebook_dim: D, the features of a code, by default `dim`; linear layers project to heads * D features and back
            where this differs from `dim`.
        heads: the number of codes of a vector; with separate_codebook_per_head each head has a codebook of its own.
        decay, eps: of the moving averages that the codes follow with ema_update (the default).
        learnable_codebook: the codes learn by gradient, with ema_update=False.
        threshold_ema_dead_code: replace codes whose moving average of the counts is below this; 0 disables it.
        rotation_trick: the gradient to the input is that of `rotation_trick` (default), otherwise straight-through.
        sync_codebook: all-reduce statistics over ranks; None and True: whenever torch.distributed is initialised.
    Raises:
        TypeError: an argument is not implemented, or unknown.
        ValueError: an argument is out of its range.

    state_dict: `_codebook.embed` and `_codebook.embed_avg` [H, K, D], `_codebook.cluster_size` [H, K],
    `_codebook.initted` [] bool, with H = heads if separate_codebook_per_head, otherwise 1; `project_in.*` and
    `project_out.*` where there is a projection.

    >>> layer = VectorQuantize(dim=16, codebook_size=32, accept_image_fmap=True)
    >>> quantized, indices, loss = layer(torch.randn(2, 16, 8, 8))
    >>> quantized.shape, indices.shape, loss.shape
    (torch.Size([2, 16, 8, 8]), torch.Size([2, 8, 8]), torch.Size([]))
    >>> layer.get_output_from_indices(indices).shape
    torch.Size([2, 16, 8, 8])

    Source: van den Oord et al. 2017, arXiv:1711.00937; Fifty et al. 2024, arXiv:2410.06424 (rotation trick).
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        *,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        **unsupported: Any,
    ) -> None:
        super().__init__()
        check_arguments("VectorQuantize", unsupported)
        self.dim = check_size("dim", dim, 1)
        self.heads = check_size("heads", heads, 1)
        for name, weight in (
            ("commitment_weight", commitment_weight),
            ("orthogonal_reg_weight", orthogonal_reg_weight),
            ("codebook_diversity_loss_weight", codebook_diversity_loss_weight),
        ):
            check_at_least(name, weight, 0)
        learnable_codebook = bool(learnable_codebook)
        ema_update = True if ema_update is None else ema_update
        if learnable_codebook and ema_update:
            raise ValueError(
                "expected ema_update=False with learnable_codebook=True, since the codes learn by gradient, got"
                f" ema_update={ema_update}"
            )
        if learnable_codebook and use_cosine_sim:
            raise ValueError("expected learnable_codebook=False with use_cosine_sim=True, got True")
        codebook_dim = self.dim if codebook_dim is None else check_size("codebook_dim", codebook_dim, 1)
        width = codebook_dim * self.heads
        self.has_projections = width != self.dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            linear = nn.Linear(self.dim, width)
            self.project_in = nn.Sequential(linear, nn.LayerNorm(width)) if layernorm_after_project_in else linear
            self.project_out = nn.Linear(width, self.dim)
        self.separate_codebook_per_head = separate_codebook_per_head
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.commitment_weight = commitment_weight
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.stochastic_sample_codes = stochastic_sample_codes
        self.sample_codebook_temp = sample_codebook_temp
        self.rotation_trick = self.dim > 1 if rotation_trick is None else rotation_trick
        self.learnable_codebook = learnable_codebook
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            self.heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            learnable_codebook=learnable_codebook or orthogonal_reg_weight > 0,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            use_cosine_sim=use_cosine_sim,
            sync=sync_codebook is not False,
        )

    @property
    def codebook_size(self) -> int:
        """K, the number of codes."""
        return self._codebook.codebook_size

    @property
    def eps(self) -> float:
        """The Laplace smoothing of the cluster sizes."""
        return self._codebook.arguments()["epsilon"]

    @property
    def ema_update(self) -> bool:
        """Whether the codes follow moving averages."""
        return self._codebook.ema_update

    @property
    def usage(self) -> CodebookUsage:
        """How evenly the codes are used, of each codebook [H]."""
        return self._codebook.usage

    @property
    def codebook(self) -> Tensor:
        """The codes [K, D], or [H, K, D] with separate codebooks."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes[None])

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Any = None,
        ema_update_weight: EmaWeight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> Any:
        """Quantize vectors.

        Args:
            x: [b, n, dim], one vector [b, dim], with channel_last=False [b, dim, n], or maps [b, dim, *spatial].
            indices: return the cross-entropy of the similarities to these codes in place of indices and loss.
            mask, lens: [b, n] ([b, *spatial]) bool, True for a valid vector, or the number of valid vectors [b].
            ema_update_weight: of this batch in the moving averages, for each code.
            accum_ema_update: keep the statistics for the next step without it.
        Returns:
            (quantized, indices, loss), and with return_loss_breakdown a `LossBreakdown`: quantized as x; indices
            int64 [b, n], of a map [b, *spatial], followed by the heads; -1 where masked; loss a scalar, 0 in eval mode.
            With `indices` (quantized, cross-entropy).
        Raises:
            ValueError: a shape, dtype or device does not fit; nothing has been changed.
        """
        check_arguments("VectorQuantize.forward", {"topk": topk, "codebook_transform_fn": codebook_transform_fn})
        sequence, valid, spatial = self._as_sequence(x, mask, lens)
        vectors, positions = self._as_vectors(sequence, valid)
        codebook = self._codebook
        is_frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        updates = codebook.begin(vectors.numel(), lambda: codebook.initial_codes(vectors, positions), is_frozen)
        temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        # The losses below need the codes as they were.
        codes = codebook.embed
        similarities = None
        if indices is not None or (self.training and self.codebook_diversity_loss_weight > 0):
            codes = codes.clone()
            similarities = codebook.similarities(vectors, codes)
            similarities = similarities.view(*sequence.shape[:2], self.heads, self.codebook_size)
        is_routed = self.training and x.requires_grad and self.route_gradients_to_input
        out = self._quantize(vectors, codes, positions, temperature, is_routed)
        if updates:
            codebook.learn(
                vectors,
                out.indices,
                positions,
                weight=ema_update_weight,
                accumulate=accum_ema_update,
                ema_update=ema_update,
            )
        quantized = self._as_output(out.quantized, sequence, valid, spatial)
        if indices is not None:
            assert similarities is not None
            return quantized, cross_entropy(similarities.flatten(0, -2), indices.flatten(), ignore_index=-1)
        found = out.indices.view(*sequence.shape[:2], self.heads)
        loss, breakdown = self._losses(out, found, similarities, is_frozen)
        found = indices_to_map(found if self.heads > 1 else found.squeeze(-1), spatial)
        return (quantized, found, loss, breakdown) if return_loss_breakdown else (quantized, found, loss)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes at indices, as `get_output_from_indices` without the projection; -1 gives zeros."""
        codes = self._codes_at(indices)
        return codes.movedim(-1, 1) if self._is_channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` for its indices, in its layout; a position with -1 alone gives zeros."""
        is_code = indices >= 0
        output = zeros_where_masked(
            project(self.project_out, self._codes_at(indices)), is_code.any(-1) if self.heads > 1 else is_code
        )
        return output.movedim(-1, 1) if self._is_channel_first else output

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Update the moving averages by vectors x and their indices, as `forward` takes and returns them."""
        sequence, valid, _ = self._as_sequence(x, mask, None)
        vectors, positions = self._as_vectors(sequence, valid)
        self._codebook.learn(vectors.detach(), indices.reshape(vectors.shape[:-1]), positions)

    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor) -> None:
        """Replace dead codes by vectors of x [b, n, heads * D], in train mode."""
        x = to_unit_length(x) if self.use_cosine_sim else x
        self._codebook.expire_codes_(self._split(x))

    @property
    def _is_channel_first(self) -> bool:
        return not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap

    def _as_sequence(
        self, x: Tensor, mask: Tensor | None, lens: Tensor | None
    ) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Check x; the sequence [b, n, dim], its mask [b, n] and the spatial shape of the map."""
        check_floating("x", x)
        check_features(x, self.dim, self._is_channel_first, "accept_image_fmap")
        check_same_device("x", x, "the codebook", self._codebook.embed)
        sequence, spatial = to_sequence(x, self._is_channel_first)
        if mask is not None and lens is not None:
            raise ValueError("expected mask or lens, got both")
        if lens is not None:
            mask = torch.arange(sequence.shape[1], device=x.device) < lens[:, None]
        elif mask is not None and mask.shape != (x.shape[0], *spatial) and mask.shape != sequence.shape[:2]:
            raise ValueError(f"expected mask of shape {(x.shape[0], *spatial)}, got {tuple(mask.shape)}")
        return sequence, None if mask is None else mask.reshape(sequence.shape[:2]).bool(), spatial

    def _as_vectors(self, sequence: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The vectors of the codebooks, [b, n, H, D] or [b, n * heads, 1, D], projected; and their mask."""
        x = zeros_where_masked(sequence, valid)
        if isinstance(self.project_in, nn.Sequential):
            linear, norm = self.project_in
            x = project(linear, x)
            with without_autocast(x):
                x = norm(x)
        else:
            x = project(self.project_in, x)
        vectors = self._split(x)
        if valid is not None and vectors.shape[1] != sequence.shape[1]:
            valid = valid.repeat_interleave(self.heads, 1)
        return to_unit_length(vectors) if self.use_cosine_sim else vectors, valid

    def _split(self, x: Tensor) -> Tensor:
        """The heads of x [b, n, heads * D], as those of the codebooks: [b, n, H, D] or [b, n * heads, 1, D]."""
        heads = x.unflatten(-1, (self.heads, -1))
        return heads if self.separate_codebook_per_head else heads.flatten(1, 2).unsqueeze(-2)

    def _quantize(
        self, vectors: Tensor, codes: Tensor, valid: Tensor | None, temperature: float, is_routed: bool
    ) -> VectorQuantizeOutput:
        """The nearest or sampled codes, with a gradient to the vectors if it `is_routed`, otherwise to the codes."""
        codes = codes_like(codes, vectors)
        gradient: Gradient = "rotation" if is_routed and self.rotation_trick else "straight_through"
        if self.training and self.stochastic_sample_codes and temperature > 0:
            out = quantize_at(self._codebook.sample(vectors, temperature), vectors, codes, valid, gradient)
        else:
            mask = None if valid is None else valid[..., None].expand(vectors.shape[:-1])
            out = vector_quantize(vectors, codes, mask=mask, gradient=gradient)
        if is_routed:
            return out
        found = gather_codes(codes, out.indices) if codes.requires_grad else out.quantized.detach()
        return out._replace(quantized=found)

    def _losses(
        self, out: VectorQuantizeOutput, indices: Tensor, similarities: Tensor | None, is_frozen: bool
    ) -> tuple[Tensor, LossBreakdown]:
        """The loss and its terms; all are 0 in eval mode."""
        zero = torch.zeros_like(out.commitment_loss)
        loss = commitment = diversity = orthogonal = zero
        if self.training:
            if self.codebook_diversity_loss_weight > 0:
                assert similarities is not None
                diversity = diversity_loss(similarities, indices >= 0, self.codebook_diversity_temperature)
                loss = loss + diversity * self.codebook_diversity_loss_weight
            if self.commitment_weight > 0:
                learns = self.learnable_codebook and not is_frozen
                commitment = loss_of_both(out) if learns else out.commitment_loss
                loss = loss + commitment * self.commitment_weight
            if self.orthogonal_reg_weight > 0:
                used = indices if self.orthogonal_reg_active_codes_only else None
                # The next forward changes the codes in place, perhaps before the backward of this one.
                orthogonal = orthogonal_loss(self._codebook.embed.clone(), used, self.orthogonal_reg_max_codes)
                loss = loss + orthogonal * self.orthogonal_reg_weight
            if torch.is_grad_enabled() and not loss.requires_grad and not torch.compiler.is_compiling():
                loss = loss.clone().requires_grad_()
        return loss, LossBreakdown(commitment, diversity, orthogonal, zero)

    def _as_output(self, quantized: Tensor, sequence: Tensor, valid: Tensor | None, spatial: torch.Size) -> Tensor:
        """Quantized vectors of the codebooks as a map like the input."""
        merged = quantized.reshape(*sequence.shape[:2], self.heads * quantized.shape[-1])
        output, zeros = project(self.project_out, merged), self.return_zeros_for_masked_padding
        return to_masked_map(output, sequence, valid, zeros, spatial, self._is_channel_first)

    def _codes_at(self, indices: Tensor) -> Tensor:
        """The codes of indices [b, ...] or [b, ..., heads], those of all heads in one vector."""
        embed = self._codebook.embed
        if self.separate_codebook_per_head:
            return gather_codes(embed, indices if self.heads > 1 else indices[..., None]).flatten(-2)
        codes = gather_codes(embed[0], indices)
        return codes.flatten(-2) if self.heads > 1 else codes

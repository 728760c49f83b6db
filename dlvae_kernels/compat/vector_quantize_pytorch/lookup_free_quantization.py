"""Lookup-free quantization under the names of vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from ...functional.autocast import without_autocast
from ...functional.checks import check_flags, check_floating, check_size
from ...layers.bit_losses import bit_entropies, mean_of_valid
from ...layers.distributed import check_exportable
from ...layers.maps import long_indices
from ...layers.projection import project, to_unit_length, zeros_where_masked
from .layout import check_features

# The mean distribution over all codes, which the batch entropy needs, has 2^24 elements at most.
_MOST_BITS_OF_ENTROPY = 24
_MOST_BITS = 63


class Return(NamedTuple):
    """The result of `LFQ`.

    >>> Return._fields
    ('quantized', 'indices', 'entropy_aux_loss')
    """

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LossBreakdown(NamedTuple):
    """The terms of the loss of `LFQ`, without their weights.

    >>> LossBreakdown._fields
    ('per_sample_entropy', 'batch_entropy', 'commitment')
    """

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class CosineSimLinear(nn.Module):
    """Cosines between vectors and the columns of `weight` [dim_in, dim_out], times scale; in float32 or wider.

    >>> CosineSimLinear(16, 4)(torch.randn(2, 16)).shape
    torch.Size([2, 4])
    """

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        with without_autocast(x):
            return normalize(x.to(dtype), dim=-1) @ normalize(self.weight.to(dtype), dim=0) * self.scale


class LFQ(nn.Module):
    """Lookup-free quantizer with the interface of vector-quantize-pytorch 1.32: each feature becomes its sign.

    The arguments, attributes, results and `state_dict` are those of `vector_quantize_pytorch.LFQ`, and all arguments
    are implemented. In train mode entropy_aux_loss = entropy_loss_weight * (per-sample entropy - diversity_gamma *
    batch entropy) + commitment_loss_weight * mean (x - sg[q])^2; in eval mode it is 0. What differs:

    - No N x 2^d matrix is materialised, and `codebook` is computed when it is read.
    - The entropies are exact. vector-quantize-pytorch takes logarithms of no less than 1e-5, which lowers an entropy
      by the sum of p log(1e-5 / p) over the codes of a smaller probability p.
    - Over ranks the batch entropy and its gradient are those of one process on the whole batch.
    - With a mask [b, n] the batch entropy is that of the mean distribution; vector-quantize-pytorch returns the
      per-sample entropy. Without a valid vector the losses are 0.
    - The index -1 decodes to zeros. An input of zeros has a finite gradient with spherical=True.
    - The computation ignores autocast and is in float32 or wider, projections included; quantized has the dtype of x.
    - Any layout is accepted: [b, d], and maps of 4 or more dimensions with channel_first=False.

    Args:
        codebook_size: 2^d, d at most 63; at most 24 with an entropy loss. The default is 2^dim.
        straight_through_activation: a module or function that the gradient passes through; None for the identity.
        entropy_loss_weight: with 0 the entropies are only computed for a loss breakdown.
        channel_first: the layout of maps; None: channels come first in maps of 4 or more dimensions.
        force_quantization_f32: the losses are float32; with False they have the dtype of x.
    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is unknown.

    state_dict: `mask` [d] int64, the place values of the bits. With projections `project_in.weight` [C * d, D] and
    `project_out.weight` [D, C * d] and, with projection_has_bias, the biases; with cosine_sim_project_in
    `project_in.weight` is [D, C * d] without a bias. `orthogonal_rot` [d, d] with orthogonal_rotation.

    >>> quantizer = LFQ(codebook_size=1024, dim=16)
    >>> quantized, indices, entropy_aux_loss = quantizer(torch.randn(2, 16, 4, 4))
    >>> quantized.shape, indices.shape, entropy_aux_loss.shape
    (torch.Size([2, 16, 4, 4]), torch.Size([2, 4, 4]), torch.Size([]))
    >>> bool((quantizer.indices_to_codes(indices) == quantized).all())
    True

    Source: Yu et al. 2023, arXiv:2310.05737; spherical: Zhao et al. 2024, arXiv:2406.07548; interface: lucidrains,
    vector-quantize-pytorch.
    """

    mask: Tensor
    zero: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: Callable[[Tensor], Tensor] | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        self.num_codebooks = check_size("num_codebooks", num_codebooks, 1)
        self.codebook_dim = _num_bits(codebook_size, dim)
        self.codebook_size = 1 << self.codebook_dim
        width = self.codebook_dim * self.num_codebooks
        self.dim = width if dim is None else check_size("dim", dim, 1)
        self.has_projections = self.dim != width if has_projections is None else has_projections
        self.keep_num_codebooks_dim = (
            self.num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        )
        if not self.has_projections and self.dim != width:
            raise ValueError(
                f"expected dim to be the {width} bits of all codebooks without projections, got {self.dim};"
                " leave out has_projections"
            )
        if self.num_codebooks > 1 and not self.keep_num_codebooks_dim:
            raise ValueError(f"expected keep_num_codebooks_dim with {self.num_codebooks} codebooks, got False")
        if entropy_loss_weight != 0 and self.codebook_dim > _MOST_BITS_OF_ENTROPY:
            raise ValueError(
                f"expected at most 2^{_MOST_BITS_OF_ENTROPY} codes with an entropy loss, got 2^{self.codebook_dim};"
                " pass more num_codebooks or entropy_loss_weight=0"
            )
        if not 0 < frac_per_sample_entropy <= 1:
            raise ValueError(f"expected frac_per_sample_entropy in (0, 1], got {frac_per_sample_entropy}")
        if soft_clamp_input_value is not None and not soft_clamp_input_value >= codebook_scale:
            raise ValueError(
                f"expected soft_clamp_input_value to be at least codebook_scale={codebook_scale},"
                f" got {soft_clamp_input_value}"
            )
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections and cosine_sim_project_in:
            scale = codebook_scale if cosine_sim_project_in_scale is None else cosine_sim_project_in_scale
            self.project_in = CosineSimLinear(self.dim, width, scale)
        elif self.has_projections:
            self.project_in = nn.Linear(self.dim, width, bias=projection_has_bias)
        if self.has_projections:
            self.project_out = nn.Linear(width, self.dim, bias=projection_has_bias)
        self.channel_first = channel_first
        self.activation = nn.Identity() if straight_through_activation is None else straight_through_activation
        self.spherical = spherical
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer(
                "orthogonal_rot", nn.init.orthogonal_(torch.empty(self.codebook_dim, self.codebook_dim))
            )
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.diversity_gamma = diversity_gamma
        self.entropy_loss_weight = entropy_loss_weight
        self.codebook_scale = codebook_scale
        self.commitment_loss_weight = commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.entropy_loss_offset = entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.force_quantization_f32 = force_quantization_f32
        self.register_buffer("mask", 2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def codebook(self) -> Tensor:
        """All codes [2^d, d] of `bits_to_codes`, computed at each read."""
        return self.bits_to_codes(self._bits(torch.arange(self.codebook_size, device=self.mask.device)).to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of codes that are decoded from indices; `.to` changes it."""
        return self.zero.dtype

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """Floating bits, 0 or 1, as features of -codebook_scale or codebook_scale."""
        return bits * (2 * self.codebook_scale) - self.codebook_scale

    def maybe_l2norm(self, x: Tensor) -> Tensor:
        """Vectors of length codebook_scale if spherical, zeros below 1e-6; otherwise x itself."""
        return to_unit_length(x) * self.codebook_scale if self.spherical else x

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """The codes at indices, of dtype `self.dtype`.

        Args:
            indices: integers [b, *spatial], or [b, *spatial, C] with keep_num_codebooks_dim; -1 stands for no code.
            project_out: apply the output projection where there is one.
        Returns:
            [b, *spatial, D], or [b, D, *spatial] in the layouts where `forward` returns that.
        Raises:
            ValueError: a floating dtype, or not C indices in the last dimension.
        """
        indices = long_indices(indices)
        if not self.keep_num_codebooks_dim:
            indices = indices[..., None]
        elif indices.ndim == 0 or indices.shape[-1] != self.num_codebooks:
            raise ValueError(f"expected indices of shape [..., {self.num_codebooks}], got {tuple(indices.shape)}")
        is_code = indices >= 0
        codes = self._codes(self._bits(indices), torch.promote_types(self.dtype, torch.float32))
        codes = self._rotate_back(torch.where(is_code[..., None], codes, 0)).flatten(-2)
        if project_out:
            codes = zeros_where_masked(project(self.project_out, codes), is_code.any(-1))
        codes = codes.to(self.dtype)
        return codes.movedim(-1, 1) if self.has_channels_first(codes.ndim) else codes

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> Return | tuple[Return, LossBreakdown]:
        """Quantize vectors or a map.

        Args:
            x: [b, n, D], [b, D], a map [b, D, *spatial] with channel_first or of 4 or more dimensions, or with
                channel_first=False [b, *spatial, D]; of a floating dtype.
            inv_temperature: the probability of a code c is proportional to exp(2 * inv_temperature * x.c).
            return_loss_breakdown: return the losses without weights too.
            mask: bool [b], [b, n] or [b, *spatial], True for what the losses are computed from. It changes neither
                quantized nor indices.
        Returns:
            quantized: shape and dtype of x. In train mode its gradient passes to x unchanged.
            indices: int64 [b, *spatial], with keep_num_codebooks_dim [b, *spatial, C].
            entropy_aux_loss: a scalar.
        Raises:
            ValueError: shape, dtype or mask do not fit.
        """
        check_floating("x", x)
        if self.training:
            check_exportable(type(self).__name__, sync=True)
        channel_first = self.has_channels_first(x.ndim)
        check_features(x, self.dim, channel_first)
        vectors = x.movedim(1, -1) if channel_first else x
        valid = None if mask is None else valid_vectors(mask, vectors)
        z = self._features(vectors)
        bits = z.detach() > 0
        z, codes = self.maybe_l2norm(z), self._codes(bits, z.dtype)
        quantized = codes
        if self.training:
            # The sum is exactly the code, and has the gradient of the activation.
            activated = self.activation(z)
            quantized = codes + (activated - activated.detach())
        quantized = project(self.project_out, self._rotate_back(quantized).flatten(-2)).to(x.dtype)
        if channel_first:
            quantized = quantized.movedim(-1, 1)
        indices = (bits * self.mask).sum(-1)
        if not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        loss, breakdown = self._losses(z, codes, valid, inv_temperature, return_loss_breakdown)
        if self.training and not self.force_quantization_f32:
            loss, breakdown = loss.to(x.dtype), LossBreakdown(*(term.to(x.dtype) for term in breakdown))
        result = Return(quantized, indices, loss)
        return (result, breakdown) if return_loss_breakdown else result

    def has_channels_first(self, num_dims: int) -> bool:
        """Whether the channels of inputs of this number of dimensions come first."""
        return num_dims >= 4 if self.channel_first is None else self.channel_first

    @property
    def _feature(self) -> float:
        """The absolute value of the features of a code."""
        return self.codebook_scale / (self.codebook_dim**0.5 if self.spherical else 1)

    def _bits(self, indices: Tensor) -> Tensor:
        return (indices[..., None] & self.mask) != 0

    def _codes(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        """The codes of bits [..., d], not rotated."""
        return bits.to(dtype) * (2 * self._feature) - self._feature

    def _features(self, vectors: Tensor) -> Tensor:
        """The projected, clamped and rotated features of each codebook, [..., C, d], in float32 or wider."""
        x = vectors.float() if self.force_quantization_f32 else vectors
        x = self.project_in(x) if isinstance(self.project_in, CosineSimLinear) else project(self.project_in, x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if (limit := self.soft_clamp_input_value) is not None:
            x = (x / limit).tanh() * limit
        x = x.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if not self.orthogonal_rotation:
            return x
        with without_autocast(x):
            return x @ self.orthogonal_rot.to(x.dtype)

    def _rotate_back(self, codes: Tensor) -> Tensor:
        if not self.orthogonal_rotation:
            return codes
        with without_autocast(codes):
            return codes @ self.orthogonal_rot.to(codes.dtype).T

    def _losses(
        self, z: Tensor, codes: Tensor, valid: Tensor | None, inv_temperature: float, all_terms: bool
    ) -> tuple[Tensor, LossBreakdown]:
        """The loss and its terms, of z and codes [..., C, d]."""
        zero = torch.zeros_like(self.zero)
        if not self.training:
            return zero, LossBreakdown(zero, zero, zero)
        per_sample = batch = commitment = zero
        if self.entropy_loss_weight != 0 or all_terms:
            # The odds of a bit are exp(2 inv_temperature z c) over exp(-2 inv_temperature z c).
            logits = z * (4 * inv_temperature * self._feature)
            per_sample, batch = bit_entropies(logits, self._sampled(valid, z), sync=True)
        entropy = per_sample - self.diversity_gamma * batch
        if self.experimental_softplus_entropy_loss:
            entropy = softplus(entropy + self.entropy_loss_offset)
        if self.commitment_loss_weight > 0:
            commitment = mean_of_valid((z - codes).square().mean((-2, -1)), valid)
        loss = entropy * self.entropy_loss_weight + commitment * self.commitment_loss_weight
        return loss, LossBreakdown(per_sample, batch, commitment)

    def _sampled(self, valid: Tensor | None, z: Tensor) -> Tensor | None:
        """Flags of the valid vectors, or of a random frac_per_sample_entropy of them."""
        if self.frac_per_sample_entropy == 1:
            return valid
        shape = z.shape[:-2]
        order = torch.randn(shape.numel(), device=z.device).argsort()
        if valid is None:
            return (order < int(shape.numel() * self.frac_per_sample_entropy)).view(shape)
        # The valid vectors come first, in the same random order.
        order = torch.where(valid.flatten(), order, len(order)).argsort().argsort()
        return (order < (valid.sum().double() * self.frac_per_sample_entropy).long()).view(shape)


def valid_vectors(mask: Tensor, vectors: Tensor) -> Tensor:
    """A mask [b], [b, n] or [b, *spatial] of vectors [b, *spatial, d] as [b, *spatial].

    Raises:
        ValueError: another shape, not bool, or another device.
    """
    shape = vectors.shape[:-1]
    if mask.shape == shape[:1]:
        mask = mask.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    elif mask.shape == (shape[0], shape[1:].numel()):
        mask = mask.reshape(shape)
    check_flags("mask", mask, shape, "x", vectors)
    return mask


def _num_bits(codebook_size: int | None, dim: int | None) -> int:
    """d of 2^d codes; without a codebook size it is dim."""
    if codebook_size is None:
        if dim is None:
            raise ValueError("expected codebook_size or dim, got neither")
        return check_size("dim without codebook_size", dim, 1, _MOST_BITS)
    num_bits = check_size("codebook_size", codebook_size, 2, 1 << _MOST_BITS).bit_length() - 1
    if codebook_size != 1 << num_bits:
        raise ValueError(f"expected codebook_size to be a power of 2, got {codebook_size}; pass {2 << num_bits}")
    return num_bits

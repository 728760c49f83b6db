from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional.checks import check_at_least, check_flags, check_size
from .bit_losses import bit_entropies, mean_of_valid
from .distributed import check_exportable
from .implicit_codebook_layer import ImplicitCodebookLayer
from .maps import spatial_shape
from .projection import to_unit_length, zeros_where_masked


class LookupFreeQuantizerOutput(NamedTuple):
    """The result of `LookupFreeQuantizer`, whose `forward` describes the fields.

    >>> LookupFreeQuantizerOutput._fields
    ('quantized', 'indices', 'loss', 'per_sample_entropy', 'batch_entropy', 'commitment_loss')
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment_loss: Tensor


class LookupFreeQuantizer(ImplicitCodebookLayer):
    """Lookup-free quantizer (LFQ): each feature becomes its sign, and the signs are the bits of the index.

    loss = entropy_loss_weight * (per-sample entropy - diversity_gamma * batch entropy) + commitment_loss_weight *
    mean (x - sg[q])^2. The entropies are those of p(c | x), proportional to exp(2 * inv_temperature * x.c) over all K
    codes c: the mean over vectors of its entropy, and the entropy of its mean. No N x K matrix is materialised
    (`bit_entropy`). The gradient of the quantized map passes to x unchanged.

    The source quantizes beside a commitment loss. Only this keeps the features near the codes, so its weight here is
    0.25, as in VQ-VAE; vector-quantize-pytorch has 0.

    Args:
        codebook_size: K = 2^d, the number of codes, d at most 63; by default 2^(dim / num_codebooks).
        dim: D, the channels of the map; by default d * num_codebooks. For another D, linear projections `project_in`
            and `project_out` are learned.
        num_codebooks: C, the number of codes of a position, each with d bits and an index of its own. Entropies are
            means over the codebooks.
        entropy_loss_weight: >= 0; positive only for d <= 24, since the mean distribution has K elements. With 0 the
            entropies are not computed, and returned as 0.
        commitment_loss_weight: >= 0.
        diversity_gamma: weight of the batch entropy against the per-sample entropy, >= 0.
        inv_temperature: > 0.
        codebook_scale: the absolute value of the features of a code, or with spherical their length, > 0.
        spherical: divide vectors and codes by their lengths (binary spherical quantization).
        projection_bias: the projections have biases.
        sync: in train mode, average the distribution of the batch entropy over the ranks of torch.distributed
            whenever it is initialised. Its gradient is that of one process, if the gradients of parameters are
            averaged over ranks, as by DistributedDataParallel.
        channel_last: maps are [B, *spatial, D].
    Raises:
        ValueError: an argument is out of its range.

    state_dict: `project_in.weight` [C * d, D], `project_out.weight` [D, C * d] and, with projection_bias,
    `project_in.bias` and `project_out.bias`; empty without projections.

    >>> layer = LookupFreeQuantizer(codebook_size=1024, dim=16)
    >>> out = layer(torch.randn(2, 16, 4, 4))
    >>> out.quantized.shape, out.indices.shape, out.loss.shape
    (torch.Size([2, 16, 4, 4]), torch.Size([2, 4, 4]), torch.Size([]))
    >>> torch.allclose(layer.decode(out.indices), out.quantized, atol=1e-6)
    True

    Source: Yu et al. 2023, arXiv:2310.05737; spherical: Zhao et al. 2024, arXiv:2406.07548.
    """

    def __init__(
        self,
        codebook_size: int | None = None,
        dim: int | None = None,
        *,
        num_codebooks: int = 1,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.25,
        diversity_gamma: float = 1.0,
        inv_temperature: float = 100.0,
        codebook_scale: float = 1.0,
        spherical: bool = False,
        projection_bias: bool = True,
        sync: bool = True,
        channel_last: bool = False,
    ) -> None:
        num_codebooks = check_size("num_codebooks", num_codebooks, 1)
        if codebook_size is None:
            if dim is None:
                raise ValueError("expected codebook_size or dim, got neither")
            dim = check_size("dim", dim, 1)
            if dim % num_codebooks:
                raise ValueError(
                    f"expected dim to be a multiple of num_codebooks={num_codebooks}, got {dim}; pass codebook_size"
                )
            num_bits = dim // num_codebooks
        else:
            num_bits = check_size("codebook_size", codebook_size, 2).bit_length() - 1
            if codebook_size != 1 << num_bits:
                raise ValueError(
                    f"expected codebook_size to be a power of 2, got {codebook_size}; pass {2 << num_bits}"
                )
        if num_bits > 63:
            raise ValueError(f"expected a codebook of at most 63 bits, got {num_bits}; pass more num_codebooks")
        super().__init__(dim, num_bits, num_codebooks, projection_bias, channel_last)
        for name, value in (
            ("entropy_loss_weight", entropy_loss_weight),
            ("commitment_loss_weight", commitment_loss_weight),
            ("diversity_gamma", diversity_gamma),
        ):
            check_at_least(name, value, 0)
        for name, value in (("inv_temperature", inv_temperature), ("codebook_scale", codebook_scale)):
            if not value > 0:
                raise ValueError(f"expected {name} to be above 0, got {value}")
        if entropy_loss_weight > 0 and num_bits > 24:
            raise ValueError(
                f"expected at most 24 bits with an entropy loss, got {num_bits}; pass more num_codebooks or"
                " entropy_loss_weight=0"
            )
        self._entropy_loss_weight = entropy_loss_weight
        self._commitment_loss_weight = commitment_loss_weight
        self._diversity_gamma = diversity_gamma
        self._inv_temperature = inv_temperature
        self._codebook_scale = codebook_scale
        self._spherical = spherical
        self._sync = sync

    @property
    def codebook_size(self) -> int:
        """K, the number of codes of one codebook."""
        return 1 << self.code_dim

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> LookupFreeQuantizerOutput:
        """Quantize a map.

        Args:
            inputs: [B, D, *spatial], or [B, *spatial, D] with channel_last, float16, bfloat16, float32 or float64; with
                projections, their dtype or half precision.
            mask: [B, *spatial] bool: True for a valid position. The others get zeros and the index -1, and are in no
                loss.
        Returns:
            quantized: shape and dtype of inputs.
            indices: int64 [B, *spatial], or [B, *spatial, C] for several codebooks. The bit of the first feature is
                the most significant; a feature above 0 has the bit 1.
            loss, and its terms per_sample_entropy, batch_entropy and commitment_loss without their weights: scalars,
                float32 (float64 for float64).
        A feature that is NaN or infinite is NaN in quantized, and makes the loss NaN or infinite.
        Raises:
            ValueError: rank, D, shape of mask, dtype or device do not fit, or the layer is exported in train mode
                while ranks all-reduce.
        """
        if self.training:
            check_exportable(type(self).__name__, self._sync)
        vectors = self._as_vectors(inputs)
        if mask is not None:
            check_flags("mask", mask, spatial_shape(inputs, self._channel_last), "inputs", inputs)
            mask = mask.reshape(vectors.shape[:-1])
            vectors = zeros_where_masked(vectors, mask)
        x = self._features(vectors)
        bits = x.detach() > 0
        codes = self._codes_of(bits, x.dtype)
        indices, quantized = _index(bits), codes + (x - x.detach())
        if mask is not None:
            indices = torch.where(mask[..., None], indices, -1)
        merged = self._merge(quantized, inputs, mask)
        per_sample, batch = self._entropies(x, mask)
        errors = (x - codes).square().mean((-2, -1))
        commitment = mean_of_valid(errors, mask)
        loss = (
            self._entropy_loss_weight * (per_sample - self._diversity_gamma * batch)
            + self._commitment_loss_weight * commitment
        )
        return LookupFreeQuantizerOutput(merged, self._index_map(indices, inputs), loss, per_sample, batch, commitment)

    @property
    def _feature(self) -> float:
        """The absolute value of the features of a code."""
        return self._codebook_scale / (self.code_dim**0.5 if self._spherical else 1)

    def _features(self, vectors: Tensor) -> Tensor:
        """The vectors of each codebook [..., C, d], with the length of the codes if spherical."""
        x = self._split(vectors)
        return to_unit_length(x) * self._codebook_scale if self._spherical else x

    def _entropies(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The per-sample and the batch entropy of x [..., C, d], means over the codebooks."""
        if self._entropy_loss_weight == 0:
            return x.new_zeros(()), x.new_zeros(())
        # The odds of a bit are exp(2 inv_temperature x c) over exp(-2 inv_temperature x c).
        logits = x * (4 * self._inv_temperature * self._feature)
        return bit_entropies(logits, mask, self._sync and self.training)

    def _codes_of(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        return bits.to(dtype) * (2 * self._feature) - self._feature

    def _indices_of(self, x: Tensor) -> Tensor:
        return _index(x > 0)

    def _codes_at(self, indices: Tensor) -> Tensor:
        return self._codes_of((indices[..., None] >> _places(self.code_dim, indices)) & 1 == 1, torch.float32)

    def _arguments(self) -> dict[str, object]:
        return {
            "codebook_size": self.codebook_size,
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "entropy_loss_weight": self._entropy_loss_weight,
            "commitment_loss_weight": self._commitment_loss_weight,
            "diversity_gamma": self._diversity_gamma,
            "inv_temperature": self._inv_temperature,
            "codebook_scale": self._codebook_scale,
            "spherical": self._spherical,
            "projection_bias": self._projection_bias,
            "sync": self._sync,
            "channel_last": self._channel_last,
        }


def _places(num_bits: int, like: Tensor) -> Tensor:
    """The places of the bits of an index, the most significant first."""
    return torch.arange(num_bits - 1, -1, -1, device=like.device)


def _index(bits: Tensor) -> Tensor:
    """The integer of bits [..., d]."""
    return (bits.long() << _places(bits.shape[-1], bits)).sum(-1)

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .autocast import without_autocast
from .checks import check_flags, check_floating
from .gradients import no_forward_mode, once_differentiable

_MOST_BITS = 24
# Elements of the probabilities of half of the bits that are computed at a time.
_CHUNK_ELEMENTS = 2**19
# The entropy of a bit with a greater logit is below 1e-41; infinity times the probability 0 would be NaN.
_LARGEST_LOGIT = 100.0


class BitEntropyOutput(NamedTuple):
    """The result of `bit_entropy`, which describes the fields.

    >>> BitEntropyOutput._fields
    ('entropies', 'mean_probabilities')
    """

    entropies: Tensor
    mean_probabilities: Tensor


class _MeanProbabilities(torch.autograd.Function):
    """Computes the probabilities of a chunk of vectors at a time, in the backward once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, weights: Tensor) -> Tensor:
        total = logits.new_zeros(1 << logits.shape[1])
        for chunk in _chunks(logits, weights):
            total += _mean_probabilities(*chunk)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable("bit_entropy")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grads = []
        for logits, weights in _chunks(*ctx.saved_tensors):
            _, gradient, *_ = torch.func.vjp(partial(_mean_probabilities, weights=weights), logits)
            grads += gradient(grad)
        return torch.cat(grads), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        no_forward_mode("bit_entropy")


def _chunks(logits: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Vectors of which one chunk after the other fits in memory."""
    size = max(1, _CHUNK_ELEMENTS >> (logits.shape[1] + 1) // 2)
    return list(zip(logits.split(size), weights.split(size), strict=True))


def _mean_probabilities(logits: Tensor, weights: Tensor) -> Tensor:
    """Sum over vectors of the probabilities of all codes [2^d] of logits [N, d], weighted by [N].

    The probability of a code is the product of those of its first and second half, each one of 2^(d/2): the sum over
    the vectors is one matrix product.
    """
    bits = torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=2)
    middle = logits.shape[1] // 2
    first, second = _joint(bits[:, :middle]), _joint(bits[:, middle:])
    with without_autocast(logits):
        return ((first * weights[:, None]).T @ second).flatten()


def _joint(bits: Tensor) -> Tensor:
    """The probabilities [N, 2^d] of all codes of independent bits [N, d, 2], the first bit most significant."""
    if bits.shape[1] == 0:
        return bits.new_ones(bits.shape[0], 1)
    joint = bits[:, 0]
    for bit in bits.unbind(1)[1:]:
        joint = (joint[:, :, None] * bit[:, None]).flatten(1)
    return joint


def bit_entropy(logits: Tensor, mask: Tensor | None = None) -> BitEntropyOutput:
    """Entropies of codes of independent bits: of each vector, and the mean distribution over all 2^d codes.

    The N x 2^d matrix of probabilities is never materialised: the entropy of a vector is the sum of those of its bits,
    and the mean distribution is a product of two matrices N x 2^(d/2), computed by chunks of vectors. Under
    `torch.compile` and `torch.export` these two are whole.

    Args:
        logits: [..., d] float16, bfloat16, float32 or float64, any strides, 1 <= d <= 24: the logarithm of the odds
            that a bit is one, the first bit most significant.
        mask: [...] bool, same device: True for a valid vector; the others have an entropy of 0 and are in no mean.
    Returns:
        entropies: [...] float32 (float64 for float64), in nats.
        mean_probabilities: [2^d], same dtype: the mean over the valid vectors of the probability of each code; 0 if
        there is none.
        Both are differentiable once with respect to logits. A vector with NaN makes its entropy and the mean NaN.
    Raises:
        ValueError: d, shape, dtype or device do not fit.

    >>> out = bit_entropy(torch.tensor([[0.0, 100.0], [-100.0, 0.0]]))
    >>> out.mean_probabilities.tolist()
    [0.25, 0.5, 0.0, 0.25]
    >>> out.entropies.exp()
    tensor([2., 2.])

    Source: Yu et al. 2023, arXiv:2310.05737, eq. 5.
    """
    check_floating("logits", logits)
    if logits.ndim == 0 or not 1 <= logits.shape[-1] <= _MOST_BITS:
        raise ValueError(f"expected logits of shape [..., d] with 1 <= d <= {_MOST_BITS}, got {tuple(logits.shape)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is None:
        num_valid: Tensor | int = max(1, logits[..., 0].numel())
        weights = logits.new_ones(logits.shape[:-1]) / num_valid
    else:
        check_flags("mask", mask, logits.shape[:-1], "logits", logits)
        # A masked vector may hold NaN, whose gradient would be NaN.
        logits = torch.where(mask[..., None], logits, 0)
        weights = mask.to(logits.dtype) / mask.sum().clamp(min=1)
    size = logits.abs().clamp(max=_LARGEST_LOGIT)
    entropies = ((-size).exp().log1p() + size * torch.sigmoid(-size)).sum(-1)
    if mask is not None:
        entropies = torch.where(mask, entropies, 0)
    # A graph can neither hold a loop over an unknown number of chunks nor, if exported, a Function.
    average = _mean_probabilities if torch.compiler.is_compiling() else _MeanProbabilities.apply
    return BitEntropyOutput(entropies, average(logits.flatten(0, -2), weights.flatten()))

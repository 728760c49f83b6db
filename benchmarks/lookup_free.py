"""The entry of LookupFreeQuantizer, beside the entropies of all N x 2^d probabilities; d is the D of a size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import dlvae_kernels as dlvae

from . import baselines, judge, sizes
from .calls import Call, Tensors, differentiable
from .entry import LIBRARY, Entry, Implementation, Signature, Tolerance, Verdict, Work
from .inputs import Inputs

_ENTROPY_LOSS, _COMMITMENT_LOSS, _INV_TEMPERATURE = 0.1, 0.25, 10.0

_QUANTIZE = Signature(lambda inputs: (inputs.x,), (0,), outputs=(0, 1))


def _layer(inputs: Inputs) -> Call:
    """The layer on vectors [N, d]."""
    layer = dlvae.LookupFreeQuantizer(
        dim=inputs.size.d,
        entropy_loss_weight=_ENTROPY_LOSS,
        commitment_loss_weight=_COMMITMENT_LOSS,
        inv_temperature=_INV_TEMPERATURE,
        channel_last=True,
    )
    x = inputs.x.clone().requires_grad_()
    return differentiable(lambda: layer(x), [x], inputs.grad, lambda out: (out.quantized, out.loss))


def _plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized vectors and the loss, from the probabilities of all codes."""
    d = x.shape[1]
    places = torch.arange(d - 1, -1, -1, device=x.device)
    codes = ((torch.arange(2**d, device=x.device)[:, None] >> places) & 1).to(x.dtype) * 2 - 1
    logits = 2 * _INV_TEMPERATURE * x @ codes.T
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    mean = p.mean(0)
    entropy = -(p * log_p).sum(1).mean() + (mean * mean.clamp(min=torch.finfo(x.dtype).tiny).log()).sum()
    quantized = torch.where(x > 0, 1.0, -1.0).to(x.dtype)
    loss = _ENTROPY_LOSS * entropy + _COMMITMENT_LOSS * mse_loss(x, quantized)
    return quantized + (x - x.detach()), loss


def _lucidrains(inputs: Inputs) -> Call:
    layer = baselines.library("vector_quantize_pytorch").LFQ(
        dim=inputs.size.d, entropy_loss_weight=_ENTROPY_LOSS, commitment_loss_weight=_COMMITMENT_LOSS
    )
    layer.to(inputs.x.device)
    x = inputs.x.clone().requires_grad_()
    return differentiable(
        lambda: layer(x[None], inv_temperature=_INV_TEMPERATURE),
        [x],
        inputs.grad,
        lambda out: (out.quantized[0], out.entropy_aux_loss),
    )


_judge = judge.equals(_QUANTIZE(_plain))


def _judge_clamped(inputs: Inputs, answer: Tensors, gradients: Tensors, tolerance: Tolerance) -> Verdict:
    """Judge an implementation that takes logarithms of no less than 1e-5."""
    return _judge(inputs, answer, gradients, Tolerance(tolerance.distance, 1e-2))


LOOKUP_FREE_QUANTIZER = Entry(
    "LookupFreeQuantizer",
    "tests/layers/test_lookup_free_quantizer.py",
    (),
    {"cpu": (sizes.BITS_10, sizes.BITS_14), "cuda": (sizes.BITS_10, sizes.BITS_14)},
    (
        Implementation(LIBRARY, _layer),
        _QUANTIZE.plain("plain PyTorch", _plain),
        _QUANTIZE.compiled(_plain),
        Implementation("vector-quantize-pytorch", _lucidrains, package="vector-quantize-pytorch", judge=_judge_clamped),
    ),
    _judge,
    Work(vectors=2, indices=1),
    Work(vectors=2),
)

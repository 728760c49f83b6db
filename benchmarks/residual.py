"""The entries of the layers with several codebooks: levels and heads, with vector-quantize-pytorch as baseline."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import dlvae_kernels as dlvae

from . import baselines, judge, sizes
from .calls import Call, Prepare, Tensors, differentiable
from .entry import LIBRARY, Entry, Implementation, Tolerance, Verdict, Work
from .inputs import Inputs
from .layers import LUCIDRAINS, in_eval

_DECAY = 0.99


def _on_vectors(layer: nn.Module, inputs: Inputs, loss: int, quantized: int, indices: int) -> Call:
    """Forward and backward of a layer on vectors [1, N, D], by the positions of its outputs."""
    x = inputs.x[None].clone().requires_grad_()
    return differentiable(
        lambda: layer(x),
        [x],
        inputs.grad[None],
        lambda out: (out[loss].sum(), out[quantized]),
        lambda out: (out[quantized][0], out[indices][0]),
        lambda found: (found[0][0],),
    )


# --- levels ---


def _library_levels(inputs: Inputs, training: bool = True) -> Call:
    size = inputs.size
    layer = dlvae.ResidualVectorQuantizer(
        size.selected, size.k, size.d, 1.0, _DECAY, init="normal", gradient="each", channel_last=True
    )
    layer.codebook.set_codes(inputs.codebooks.float())
    return _on_vectors(layer.to(inputs.x.device).train(training), inputs, 0, 1, 3)


def _lucidrains_levels(inputs: Inputs, training: bool = True) -> Call:
    """ResidualVQ with its fastest settings: straight-through gradients, dead codes are not revived."""
    size, make = inputs.size, baselines.library("vector_quantize_pytorch").ResidualVQ
    options = {"num_quantizers": size.selected, "codebook_size": size.k, "decay": _DECAY, "rotation_trick": False}
    layer = make(dim=size.d, **options)
    with torch.no_grad():
        for level, codes in zip(layer.layers, inputs.codebooks.float().cpu(), strict=True):
            level.codebook = codes
            level._codebook.embed_avg.copy_(level._codebook.embed)
    return _on_vectors(layer.to(inputs.x.device).train(training), inputs, 2, 0, 1)


RESIDUAL = Entry(
    "ResidualVectorQuantizer",
    "tests/layers/test_residual_vector_quantizer.py",
    ("residual_quantize_fwd", "residual_quantize_bwd", "residual_statistics", "ema_step"),
    {"cpu": (sizes.ENCODEC_LEVELS,), "cuda": (sizes.ENCODEC_LEVELS,)},
    (
        Implementation(LIBRARY, _library_levels),
        Implementation(LUCIDRAINS, _lucidrains_levels, package=LUCIDRAINS),
    ),
    judge.residual_quantized,
    Work(level_pairs=1, vectors=2, level_codes=1, indices=1),
    Work(vectors=3, level_codes=1, indices=1),
)

RESIDUAL_EVAL = Entry(
    "ResidualVectorQuantizer eval",
    "tests/layers/test_residual_vector_quantizer.py",
    ("residual_quantize_fwd",),
    {"cpu": (sizes.ENCODEC_LEVELS, sizes.MIMI_LEVELS), "cuda": (sizes.ENCODEC_LEVELS, sizes.MIMI_LEVELS)},
    (
        Implementation(LIBRARY, in_eval(lambda inputs: _library_levels(inputs, training=False))),
        Implementation(
            LUCIDRAINS, in_eval(lambda inputs: _lucidrains_levels(inputs, training=False)), package=LUCIDRAINS
        ),
    ),
    judge.residual_quantized,
    Work(level_pairs=1, vectors=2, level_codes=1, indices=1),
)


# --- heads: the D features of a size are those of all heads ---


def _codebooks_of_heads(inputs: Inputs) -> Tensor:
    """[H, K, D / H] from the codes [K, D]."""
    return inputs.codes.unflatten(1, (inputs.size.selected, -1)).movedim(1, 0).contiguous()


def _heads(make: Any, training: bool) -> Prepare:
    return lambda inputs: make(inputs, training)


def _library_heads(inputs: Inputs, training: bool) -> Call:
    size = inputs.size
    layer = dlvae.VectorQuantizerEMA(
        size.k, size.d, 0.25, _DECAY, num_heads=size.selected, channel_last=True, encodings="indices"
    )
    layer.set_codes(_codebooks_of_heads(inputs).float())
    return _on_vectors(layer.to(inputs.x.device).train(training), inputs, 0, 1, 3)


def _lucidrains_heads(inputs: Inputs, training: bool) -> Call:
    size, make = inputs.size, baselines.library("vector_quantize_pytorch").VectorQuantize
    layer = make(
        dim=size.d,
        codebook_size=size.k,
        codebook_dim=size.d // size.selected,
        heads=size.selected,
        separate_codebook_per_head=True,
        decay=_DECAY,
        commitment_weight=0.25,
        rotation_trick=False,
    )
    with torch.no_grad():
        layer._codebook.embed.copy_(_codebooks_of_heads(inputs).float().cpu())
        layer._codebook.embed_avg.copy_(layer._codebook.embed)
    return _on_vectors(layer.to(inputs.x.device).train(training), inputs, 2, 0, 1)


def _judge_heads(inputs: Inputs, answer: Tensors, gradients: Tensors, tolerance: Tolerance) -> Verdict:
    """Judge (quantized [N, D], indices [N, H]) head by head, then the values and the gradient of x."""
    vectors, indices = answer[0], answer[1].clone()
    codebooks, found = _codebooks_of_heads(inputs), Verdict(0.0, 0.0, False)
    parts = inputs.x.chunk(len(codebooks), 1)
    for x, codes, index in zip(parts, codebooks, indices.T, strict=True):
        of_head = dataclasses.replace(inputs, x=x, codes=codes)
        head = judge.nearest(of_head, (index,), None, tolerance)
        differing = (found.differing or 0.0) + (head.differing or 0.0) / len(codebooks)
        found = Verdict(differing, max(found.error, head.error), found.wrong or head.wrong)
    if found.wrong:
        return found

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.cat([codes[index].to(x.dtype) for codes, index in zip(codebooks, indices.T, strict=True)], 1)
        return x + (q - x).detach(), 0.25 * mse_loss(q, x)

    exact, exact_gradients = judge.differentiated(formula, (inputs.x,), inputs.grad)
    return found.and_values(judge.close((exact, *exact_gradients), (vectors, *gradients), tolerance))


HEADS = Entry(
    "VectorQuantizerEMA heads",
    "tests/layers/test_quantizer_options.py",
    ("vector_quantize_fwd", "vector_quantize_bwd", "ema_statistics", "ema_step"),
    {"cpu": (sizes.HEADS,), "cuda": (sizes.HEADS,)},
    (
        Implementation(LIBRARY, _heads(_library_heads, True)),
        Implementation(LUCIDRAINS, _heads(_lucidrains_heads, True), package=LUCIDRAINS),
    ),
    _judge_heads,
    Work(pairs=1, vectors=2, codes=1, indices=1, float32_codes=4),
    Work(vectors=3, indices=1),
)

HEADS_EVAL = Entry(
    "VectorQuantizerEMA heads eval",
    "tests/layers/test_quantizer_options.py",
    ("vector_quantize_fwd",),
    {"cpu": (sizes.HEADS,), "cuda": (sizes.HEADS,)},
    (
        Implementation(LIBRARY, in_eval(_heads(_library_heads, False))),
        Implementation(LUCIDRAINS, in_eval(_heads(_lucidrains_heads, False)), package=LUCIDRAINS),
    ),
    _judge_heads,
    Work(pairs=1, vectors=2, codes=1, indices=1),
)

SEVERAL_CODEBOOKS = RESIDUAL, RESIDUAL_EVAL, HEADS, HEADS_EVAL

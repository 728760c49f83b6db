"""The entries of the layers, beside the layers that users have today."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import dlvae_kernels as dlvae
from tests.oracles import notebook

from . import baselines, judge
from .entry import Call, Contender, Entry, Inputs, Size, Tolerance, Verdict, Work, to_map, to_rows
from .sizes import CIFAR, DICTIONARY, ENCODEC, FINE, LASER, LLAMAGEN, VQGAN, VQVAE2

_DECAY, _EPSILON = 0.99, 1e-5
_EMA_COMMITMENT = 0.25


def _pass_through(layer: nn.Module, inputs: Inputs, read: Callable[[Any], tuple[Tensor, Tensor, Tensor]]) -> Call:
    """Forward and backward of a layer on a map; `read` takes loss, quantized map and indices from what it returns."""
    map = inputs.map
    x, grad = map.clone().requires_grad_(), to_map(inputs.grad, map.shape)
    learned = [x, *(each for each in layer.parameters() if each.requires_grad)]

    def backward(out: Any) -> tuple[Tensor, ...]:
        loss, quantized, _ = read(out)
        gradients = torch.autograd.grad((loss, quantized), learned, (torch.ones_like(loss), grad))
        return (to_rows(gradients[0]), *(each.view(inputs.codes.shape) for each in gradients[1:]))

    def answer(out: Any) -> tuple[Tensor, ...]:
        _, quantized, indices = read(out)
        return to_rows(quantized.detach()), indices.flatten()

    return Call(lambda: layer(x), backward, answer)


def _in_eval(prepare: Callable[[Inputs], Call]) -> Callable[[Inputs], Call]:
    """The forward alone, of a layer that has learned, where nothing needs a gradient."""

    def prepare_eval(inputs: Inputs) -> Call:
        call = prepare(inputs)

        def forward() -> Any:
            with torch.inference_mode():
                return call.forward()

        return Call(forward, answer=call.answer)

    return prepare_eval


def _give(layer: Any, inputs: Inputs) -> Any:
    """Start a layer of ours at the codes of the inputs."""
    key = "_embedding.weight"
    state = layer.state_dict()
    state[key] = inputs.codes.float()
    if "_ema_w" in state:
        state["_ema_w"] = inputs.codes.float()
    layer.load_state_dict(state)
    return layer.to(inputs.x.device)


def _vector_quantizer(inputs: Inputs) -> Call:
    layer = dlvae.VectorQuantizer(inputs.size.k, inputs.size.d, 1.0, encodings="indices")
    return _pass_through(_give(layer, inputs), inputs, lambda out: (out[0], out[1], out[3]))


def _vector_quantizer_ema(inputs: Inputs, training: bool = True) -> Call:
    layer = dlvae.VectorQuantizerEMA(
        inputs.size.k, inputs.size.d, _EMA_COMMITMENT, _DECAY, _EPSILON, encodings="indices"
    )
    return _pass_through(_give(layer, inputs).train(training), inputs, lambda out: (out[0], out[1], out[3]))


def _of_one_hot(out: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return out[0], out[1], out[3].argmax(1)


def _notebook(inputs: Inputs) -> Call:
    return _pass_through(notebook.VectorQuantizer(inputs.codes, 1.0), inputs, _of_one_hot)


def _notebook_ema(inputs: Inputs) -> Call:
    layer = notebook.VectorQuantizerEMA(inputs.codes, _EMA_COMMITMENT, _DECAY, _EPSILON)
    return _pass_through(layer, inputs, _of_one_hot)


def _lucidrains(training: bool = True, **options: Any) -> Callable[[Inputs], Call]:
    """vector-quantize-pytorch, straight through as ours and without revival of codes: what it does fastest."""

    def prepare(inputs: Inputs) -> Call:
        library = baselines.library("vector_quantize_pytorch")
        layer = library.VectorQuantize(
            inputs.size.d, inputs.size.k, decay=_DECAY, accept_image_fmap=True, rotation_trick=False, **options
        )
        with torch.no_grad():
            layer.codebook = inputs.codes.float().cpu()
            layer._codebook.embed_avg.copy_(layer._codebook.embed)
        layer.to(inputs.x.device).train(training)
        return _pass_through(layer, inputs, lambda out: (out[2], out[0], out[1]))

    return prepare


def _search_and_move(size: Size) -> Work:
    words = (2 * size.n + size.k) * size.d
    return Work(2.0 * size.n * size.k * size.d, size.dtype.itemsize * words + 8 * size.n)


def _search_and_average(size: Size) -> Work:
    work = _search_and_move(size)
    return Work(work.flops, work.bytes + 4 * 4 * size.k * size.d)


def _move_back(size: Size) -> Work:
    return Work(0, size.dtype.itemsize * 3 * size.n * size.d + 8 * size.n)


VECTOR_QUANTIZER = Entry(
    "VectorQuantizer",
    "tests/layers/test_vector_quantizer.py",
    ("vector_quantize_fwd", "vector_quantize_bwd"),
    {"cpu": (CIFAR, ENCODEC), "cuda": (CIFAR, VQGAN, LLAMAGEN)},
    (
        Contender("dlvae_kernels", _vector_quantizer, exact=True),
        Contender("notebook", _notebook),
        Contender(
            "vector-quantize-pytorch",
            _lucidrains(learnable_codebook=True, ema_update=False, commitment_weight=1.0),
            package="vector-quantize-pytorch",
        ),
    ),
    judge.quantized,
    {"forward": _search_and_move, "backward": _move_back},
)

VECTOR_QUANTIZER_EMA = Entry(
    "VectorQuantizerEMA",
    "tests/layers/test_vector_quantizer_ema.py",
    ("vector_quantize_fwd", "vector_quantize_bwd", "ema_statistics", "ema_step"),
    {"cpu": (CIFAR, FINE, VQGAN), "cuda": (CIFAR, VQVAE2, VQGAN, LLAMAGEN)},
    (
        Contender("dlvae_kernels", _vector_quantizer_ema, exact=True),
        Contender("notebook", _notebook_ema),
        Contender(
            "vector-quantize-pytorch",
            _lucidrains(commitment_weight=_EMA_COMMITMENT),
            package="vector-quantize-pytorch",
        ),
        Contender(
            "vector-quantize-pytorch, cosine",
            _lucidrains(commitment_weight=_EMA_COMMITMENT, use_cosine_sim=True),
            package="vector-quantize-pytorch",
            judge=partial(judge.quantized, commitment_cost=_EMA_COMMITMENT, normalizes=True),
        ),
    ),
    partial(judge.quantized, commitment_cost=_EMA_COMMITMENT),
    {"forward": _search_and_average, "backward": _move_back},
    # Rows and codes of length 1, where the cosine finds the codes that the distance finds.
    unit=True,
)

VECTOR_QUANTIZER_EMA_EVAL = Entry(
    "VectorQuantizerEMA eval",
    "tests/layers/test_vector_quantizer_ema.py",
    ("vector_quantize_fwd",),
    {"cpu": (CIFAR, FINE), "cuda": (CIFAR, VQGAN)},
    (
        Contender("dlvae_kernels", _in_eval(partial(_vector_quantizer_ema, training=False)), exact=True),
        Contender("vector-quantize-pytorch", _in_eval(_lucidrains(training=False)), package="vector-quantize-pytorch"),
    ),
    judge.quantized,
    {"forward": _search_and_move},
)


def _dictionary_learning(make: Callable[..., Any], **options: Any) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        torch.manual_seed(0)
        size, map = inputs.size, inputs.map
        layer = make(size.d, size.k, 0.1, size.kept, **options).to(map.device)
        with torch.no_grad():
            layer.dictionary.copy_(inputs.codes)
        x, grad = map.clone().requires_grad_(), to_map(inputs.grad, map.shape)
        learned = [x, *layer.parameters()]

        def backward(out: Any) -> tuple[Tensor, ...]:
            gradients = torch.autograd.grad(out[:2], learned, (torch.ones_like(out[0]), grad))
            return (to_rows(gradients[0]), *gradients[1:])

        def answer(out: Any) -> tuple[Tensor, ...]:
            return to_rows(out[1].detach()), _dense(out[2], size).detach() != 0

        return Call(lambda: layer(x), backward, answer)

    return prepare


def _dense(representation: Any, size: Size) -> Tensor:
    if isinstance(representation, Tensor):
        return representation
    values, indices = (each.flatten(0, -2) for each in representation)
    return values.new_zeros(size.n, size.k).scatter(1, indices, values)


def _judge_dictionary(inputs: Inputs, answer: tuple[Tensor, ...], gradients: Any, tolerance: Tolerance) -> Verdict:
    """Of the reconstructed rows, the atoms that were kept [N, K] and all gradients, in float64 given those atoms."""
    rows, kept = answer
    if not bool((kept.sum(1) == inputs.size.kept).all()):
        return Verdict(1.0, float("inf"), True)
    x, dictionary = inputs.x.double().requires_grad_(), inputs.codes.double().requires_grad_()
    chosen = kept.nonzero()[:, 1].view(inputs.size.n, -1)
    found = judge.distances_at(x.detach(), dictionary.detach(), chosen).sort(dim=1)
    verdict = judge.topk(inputs, (chosen.gather(1, found.indices), found.values), None, tolerance)
    torch.manual_seed(0)
    layer = dlvae.DictionaryLearning(inputs.size.d, inputs.size.k, 0.1, inputs.size.kept)
    weight, bias = (each.detach().to(x).requires_grad_() for each in layer.representation.parameters())
    coefficients = torch.softmax(x @ weight.T + bias, dim=1) * kept
    reconstruction = coefficients @ dictionary
    loss = mse_loss(x, reconstruction.detach()) * 0.25 + mse_loss(x.detach(), reconstruction)
    loss = loss + 0.1 * coefficients.abs().sum(1).mean()
    # Straight through: the decoder's gradient reaches x unchanged.
    exact = torch.autograd.grad(loss + (x * inputs.grad).sum(), (x, dictionary, weight, bias))
    # x + (R - x) rounds at the size of x, so R - x is compared.
    values = judge.close((reconstruction - x, *exact), (rows - inputs.x, *(gradients or ())), tolerance)
    return Verdict(verdict.differing, values.error, verdict.wrong or values.wrong)


DICTIONARY_LEARNING = Entry(
    "DictionaryLearning",
    "tests/layers/test_dictionary_learning.py",
    ("topk_codes", "kept_softmax_fwd", "kept_softmax_bwd", "sparse_decode_fwd", "sparse_decode_bwd"),
    {"cpu": (DICTIONARY, LASER), "cuda": (DICTIONARY, LASER)},
    (
        Contender("dlvae_kernels", _dictionary_learning(dlvae.DictionaryLearning, representation="sparse"), exact=True),
        Contender("notebook", _dictionary_learning(notebook.DictionaryLearning)),
    ),
    _judge_dictionary,
    {
        "forward": lambda s: Work(
            2.0 * s.n * s.d * (2 * s.k + s.kept), s.dtype.itemsize * (2 * s.n + 2 * s.k) * s.d + 12 * s.n * s.kept
        ),
        "backward": lambda s: Work(
            4.0 * s.n * s.d * (s.k + s.kept), s.dtype.itemsize * (3 * s.n + 4 * s.k) * s.d + 12 * s.n * s.kept
        ),
    },
)

LAYERS = (VECTOR_QUANTIZER, VECTOR_QUANTIZER_EMA, VECTOR_QUANTIZER_EMA_EVAL, DICTIONARY_LEARNING)

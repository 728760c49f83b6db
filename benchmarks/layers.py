"""The entries of the layers, with the layers that users have today as baselines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss, normalize

import dlvae_kernels as dlvae
from tests.oracles import notebook

from . import baselines, judge, sizes
from .calls import Call, Prepare, Tensors, differentiable
from .entry import LIBRARY, Entry, Implementation, Signature, Tolerance, Verdict, Work
from .inputs import Inputs, Size, to_map, to_vectors

NOTEBOOK = "VQ-VAE notebook"
LUCIDRAINS = "vector-quantize-pytorch"
_EMA = 0.25, 0.99, 1e-5  # commitment cost, decay and epsilon


def _on_map(layer: nn.Module, inputs: Inputs, rest: Callable[[Any], Tensor], outputs: tuple[int, int] = (0, 1)) -> Call:
    """Forward and backward of a layer on a channel-first map.

    Args:
        rest: selects what the judge takes after the quantized vectors: indices [N] or selected atoms [N, K].
        outputs: positions of the loss and the quantized map in what the layer returns.
    """
    x, (loss, quantized) = inputs.map.requires_grad_(), outputs
    return differentiable(
        lambda: layer(x),
        [x, *(each for each in layer.parameters() if each.requires_grad)],
        to_map(inputs.grad, x.shape),
        lambda out: (out[loss], out[quantized]),
        lambda out: (to_vectors(out[quantized]), rest(out)),
        # vector-quantize-pytorch has codebooks [1, K, D].
        lambda found: (to_vectors(found[0]), *(each[0] if each.ndim == 3 else each for each in found[1:])),
    )


# --- VectorQuantizer and VectorQuantizerEMA ---


def _library(make: Callable[..., Any], *options: float, training: bool = True) -> Prepare:
    """A vector quantizer of this library that starts with the codes of the inputs."""

    def prepare(inputs: Inputs) -> Call:
        layer = make(inputs.size.k, inputs.size.d, *options, encodings="indices")
        state = layer.state_dict()
        state |= {key: inputs.codes.float() for key in ("_embedding.weight", "_ema_w") if key in state}
        layer.load_state_dict(state)
        return _on_map(layer.to(inputs.x.device).train(training), inputs, lambda out: out[3].flatten())

    return prepare


def _notebook(make: Callable[..., nn.Module], *options: float) -> Prepare:
    return lambda inputs: _on_map(make(inputs.codes, *options), inputs, lambda out: out[3].argmax(1))


def _lucidrains(training: bool = True, **options: Any) -> Prepare:
    """vector-quantize-pytorch with its fastest settings: straight-through gradients, dead codes are not revived."""

    def prepare(inputs: Inputs) -> Call:
        make = baselines.library("vector_quantize_pytorch").VectorQuantize
        common = {"decay": _EMA[1], "accept_image_fmap": True, "rotation_trick": False}
        layer = make(inputs.size.d, inputs.size.k, **common, **options)
        with torch.no_grad():
            layer.codebook = inputs.codes.float().cpu()
            layer._codebook.embed_avg.copy_(layer._codebook.embed)
        return _on_map(layer.to(inputs.x.device).train(training), inputs, lambda out: out[1].flatten(), (2, 0))

    return prepare


def in_eval(prepare: Prepare) -> Prepare:
    """The forward pass alone, in inference mode."""

    def prepare_eval(inputs: Inputs) -> Call:
        call = prepare(inputs)
        return Call(torch.inference_mode()(call.forward), answer=call.answer)

    return prepare_eval


_QUANTIZE = Work(pairs=1, vectors=2, codes=1, indices=1)

VECTOR_QUANTIZER = Entry(
    "VectorQuantizer",
    "tests/layers/test_vector_quantizer.py",
    ("vector_quantize_fwd", "vector_quantize_bwd"),
    {"cpu": (sizes.CIFAR, sizes.ENCODEC), "cuda": (sizes.CIFAR, sizes.VQGAN, sizes.LLAMAGEN)},
    (
        Implementation(LIBRARY, _library(dlvae.VectorQuantizer, 1.0)),
        Implementation(NOTEBOOK, _notebook(notebook.VectorQuantizer, 1.0)),
        Implementation(
            LUCIDRAINS,
            _lucidrains(learnable_codebook=True, ema_update=False, commitment_weight=1.0),
            package=LUCIDRAINS,
        ),
    ),
    judge.quantized,
    _QUANTIZE,
    Work(vectors=3, indices=1),
)

VECTOR_QUANTIZER_EMA = Entry(
    "VectorQuantizerEMA",
    "tests/layers/test_vector_quantizer_ema.py",
    ("vector_quantize_fwd", "vector_quantize_bwd", "ema_statistics", "ema_step"),
    {
        "cpu": (sizes.CIFAR, sizes.FINE, sizes.VQGAN),
        "cuda": (sizes.CIFAR, sizes.VQVAE2, sizes.VQGAN, sizes.LLAMAGEN),
    },
    (
        Implementation(LIBRARY, _library(dlvae.VectorQuantizerEMA, *_EMA)),
        Implementation(NOTEBOOK, _notebook(notebook.VectorQuantizerEMA, *_EMA)),
        Implementation(LUCIDRAINS, _lucidrains(commitment_weight=_EMA[0]), package=LUCIDRAINS),
        Implementation(
            f"{LUCIDRAINS}, cosine",
            _lucidrains(commitment_weight=_EMA[0], use_cosine_sim=True),
            package=LUCIDRAINS,
            judge=partial(judge.quantized, commitment_cost=_EMA[0], normalizes=True),
        ),
    ),
    partial(judge.quantized, commitment_cost=_EMA[0]),
    Work(pairs=1, vectors=2, codes=1, indices=1, float32_codes=4),
    Work(vectors=3, indices=1),
    # With vectors and codes of length 1, cosine similarity and distance select the same codes.
    unit=True,
)

VECTOR_QUANTIZER_EMA_EVAL = Entry(
    "VectorQuantizerEMA eval",
    "tests/layers/test_vector_quantizer_ema.py",
    ("vector_quantize_fwd",),
    {"cpu": (sizes.CIFAR, sizes.FINE), "cuda": (sizes.CIFAR, sizes.VQGAN)},
    (
        Implementation(LIBRARY, in_eval(_library(dlvae.VectorQuantizerEMA, *_EMA, training=False))),
        Implementation(LUCIDRAINS, in_eval(_lucidrains(training=False)), package=LUCIDRAINS),
    ),
    judge.quantized,
    _QUANTIZE,
)


# --- DictionaryLearning ---


def _dictionary_learning(make: Callable[..., Any], **options: Any) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        torch.manual_seed(0)
        size = inputs.size
        layer = make(size.d, size.k, 0.1, size.selected, **options).to(inputs.x.device)
        with torch.no_grad():
            layer.dictionary.copy_(inputs.codes)
        return _on_map(layer, inputs, lambda out: _dense(out[2], size) != 0)

    return prepare


def _dense(representation: Any, size: Size) -> Tensor:
    if isinstance(representation, Tensor):
        return representation
    values, indices = (each.flatten(0, -2) for each in representation)
    return values.new_zeros(size.n, size.k).scatter(1, indices, values)


def _judge_dictionary(inputs: Inputs, answer: Tensors, gradients: Tensors, tolerance: Tolerance) -> Verdict:
    """Judge the selected atoms [N, K] first, then the reconstruction and all gradients for these atoms."""
    vectors, selected = answer
    size, x = inputs.size, inputs.x.double()
    if not bool((selected.sum(1) == size.selected).all()):
        return judge.INVALID
    atoms = selected.nonzero()[:, 1].view(size.n, -1)
    squared = judge.distances_at(x, inputs.codes.double(), atoms).sort(dim=1)
    found = judge.topk(inputs, (atoms.gather(1, squared.indices), squared.values), None, tolerance)
    torch.manual_seed(0)
    layer = dlvae.DictionaryLearning(size.d, size.k, 0.1, size.selected).to(x.device)

    def formula(x: Tensor, dictionary: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        coefficients = torch.softmax(linear(x, weight, bias), dim=1) * selected
        reconstruction = coefficients @ dictionary
        loss = mse_loss(x, reconstruction.detach()) * 0.25 + mse_loss(x.detach(), reconstruction)
        return x + (reconstruction - x).detach(), loss + 0.1 * coefficients.abs().sum(1).mean()

    arguments = (inputs.x, inputs.codes, *layer.representation.parameters())
    exact, exact_gradients = judge.differentiated(formula, arguments, inputs.grad)
    # The straight-through output x + (R - x) is rounded relative to x; the comparison is of R - x.
    values = judge.close((exact - x, *exact_gradients), (vectors - inputs.x, *gradients), tolerance)
    return found.and_values(values)


DICTIONARY_LEARNING = Entry(
    "DictionaryLearning",
    "tests/layers/test_dictionary_learning.py",
    ("topk_codes", "kept_softmax_fwd", "kept_softmax_bwd", "sparse_decode_fwd", "sparse_decode_bwd"),
    {"cpu": (sizes.DICTIONARY, sizes.LASER), "cuda": (sizes.DICTIONARY, sizes.LASER)},
    (
        Implementation(LIBRARY, _dictionary_learning(dlvae.DictionaryLearning, representation="sparse")),
        Implementation(NOTEBOOK, _dictionary_learning(notebook.DictionaryLearning)),
    ),
    _judge_dictionary,
    Work(pairs=2, selected=1, vectors=2, codes=2, indices=1, float32_values=1),
    Work(pairs=2, selected=2, vectors=3, codes=4, indices=1, float32_values=1),
)


# --- SparseAutoencoder: functions of x, the parameters and k return reconstruction, values and indices ---

_ThreeTensors = tuple[Tensor, Tensor, Tensor]


def _state(inputs: Inputs) -> dict[str, Tensor]:
    """The parameters by their names in the state_dict."""
    codes = inputs.codes
    return {
        "W_dec": normalize(codes.flip(0), dim=1),
        "b_dec": 0.1 * inputs.grad[0],
        "encoder.weight": codes,
        "encoder.bias": codes[:, 0].contiguous(),
    }


_AUTOENCODER = Signature(
    lambda inputs: (inputs.x, *_state(inputs).values(), inputs.size.selected),
    learned=(1, 2, 3, 4),  # the parameters and not x, as in training
    answer=(0, 1, 2),
)


def _library_autoencoder(inputs: Inputs) -> Call:
    layer = dlvae.SparseAutoencoder(inputs.size.d, inputs.size.k, inputs.size.selected).to(inputs.x)
    layer.load_state_dict(_state(inputs))
    # The parameters have the order of `_state`.
    return differentiable(lambda: layer(inputs.x), [*layer.parameters()], inputs.grad, lambda out: out[:1], tuple)


def _plain_autoencoder(
    x: Tensor, decoder: Tensor, decoder_bias: Tensor, weight: Tensor, bias: Tensor, k: int
) -> _ThreeTensors:
    active = linear(x - decoder_bias, weight, bias).relu()
    values, indices = active.topk(k, dim=1)
    return torch.zeros_like(active).scatter(1, indices, values) @ decoder + decoder_bias, values, indices


def _sparsify(inputs: Inputs) -> Callable[..., _ThreeTensors]:
    encode, decode = baselines.sparsify_encoder(inputs), baselines.sparsify_decoder(inputs)

    def forward(
        x: Tensor, decoder: Tensor, decoder_bias: Tensor, weight: Tensor, bias: Tensor, k: int
    ) -> _ThreeTensors:
        values, indices = encode(x - decoder_bias, weight, bias, k)
        return decode(values.to(decoder.dtype), indices, decoder) + decoder_bias, values, indices

    return forward


def _sparsify_autocast(inputs: Inputs) -> Callable[..., _ThreeTensors]:
    """sparsify in bfloat16, which is how its trainer runs."""
    return torch.autocast(inputs.x.device.type, torch.bfloat16)(_sparsify(inputs))


def _judge_autoencoder(inputs: Inputs, answer: Tensors, gradients: Tensors, tolerance: Tolerance) -> Verdict:
    """Judge the indices first, then the reconstruction and the gradients for these indices."""
    reconstruction, values, indices = answer
    parameters, x = tuple(_state(inputs).values()), inputs.x.double()
    _, decoder_bias, weight, bias = (each.double() for each in parameters)
    found = judge.largest_products(x - decoder_bias, weight, bias, (indices, values), tolerance)
    if found.wrong:
        return found

    def formula(decoder: Tensor, decoder_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        active = linear(x - decoder_bias, weight, bias).gather(1, indices).relu()
        return baselines.decode_densely(active, indices, decoder) + decoder_bias

    exact, exact_gradients = judge.differentiated(formula, parameters, inputs.grad)
    return found.and_values(judge.close((exact, *exact_gradients), (reconstruction, *gradients), tolerance))


SPARSE_AUTOENCODER = Entry(
    "SparseAutoencoder",
    "tests/layers/test_sparse_autoencoder.py",
    ("topk_codes", "sparse_decode_fwd", "sparse_decode_bwd", "gather_codes_bwd"),
    {"cpu": (sizes.SAE_SMALL,), "cuda": (sizes.SAE,)},
    (
        Implementation(LIBRARY, _library_autoencoder),
        _AUTOENCODER.plain("plain PyTorch", _plain_autoencoder),
        _AUTOENCODER.chosen("sparsify", _sparsify, package="eai-sparsify"),
        _AUTOENCODER.chosen("sparsify, autocast", _sparsify_autocast, precision="bfloat16", package="eai-sparsify"),
    ),
    _judge_autoencoder,
    Work(pairs=1, selected=1, vectors=2, codes=2, indices=1, float32_values=1),
    Work(selected=4, vectors=4, codes=4, indices=1, float32_values=1),
)

LAYERS = (
    *(VECTOR_QUANTIZER, VECTOR_QUANTIZER_EMA, VECTOR_QUANTIZER_EMA_EVAL),
    *(DICTIONARY_LEARNING, SPARSE_AUTOENCODER),
)

"""The entries of a sparse autoencoder: the search of the largest products, and the whole layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import dlvae_kernels as dlvae

from . import baselines, judge
from .entry import Call, Contender, Entry, Inputs, Size, Tolerance, Verdict, Work
from .sizes import DICTIONARY, SAE, SAE_SMALL

# From x, codes and k to indices and products, in any order.
_Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _grad_of_values(inputs: Inputs) -> Tensor:
    """The same for all values of a row, whatever their order: [N, k]."""
    return inputs.values[:, :1].repeat(1, inputs.size.kept)


def _products(choose: Callable[[Inputs], _Search]) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        search, grad = choose(inputs), _grad_of_values(inputs)
        x, codes = leaves = [each.clone().requires_grad_() for each in (inputs.x, inputs.codes)]
        return Call(
            lambda: search(x, codes, inputs.size.kept),
            lambda out: torch.autograd.grad(out[1], leaves, grad.to(out[1].dtype)),
            lambda out: (out[0], out[1].detach()),
        )

    return prepare


def _sparsify_search(inputs: Inputs) -> _Search:
    encode = baselines.sparsify_encoder(inputs)

    def search(x: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = encode(x, codes, None, k)
        return indices, values

    return search


def _judge_products(inputs: Inputs, answer: tuple[Tensor, ...], gradients: Any, tolerance: Tolerance) -> Verdict:
    """The gradients are judged given the indices."""
    x, codes, grad = (each.double() for each in (inputs.x, inputs.codes, _grad_of_values(inputs)))
    found = judge.largest_products(x, codes, codes.new_zeros(len(codes)), (answer[0], answer[1]), tolerance)
    if found.wrong:
        return found
    dense = grad.new_zeros(len(x), len(codes)).scatter_(1, answer[0], grad)
    values = judge.close((dense @ codes, dense.T @ x), gradients or (), tolerance)
    return Verdict(found.differing, max(found.error, values.error), values.wrong)


TOPK_PRODUCTS = Entry(
    "topk_codes dot",
    "tests/functional/test_topk_codes.py",
    ("topk_codes", "sparse_decode_fwd", "sparse_decode_bwd"),
    {"cpu": (SAE_SMALL,), "cuda": (SAE, DICTIONARY)},
    (
        Contender(
            "dlvae_kernels",
            _products(lambda inputs: lambda x, codes, k: dlvae.topk_codes(x, codes, k, metric="dot")),
            exact=True,
        ),
        Contender("plain PyTorch", _products(lambda inputs: baselines.topk_products)),
        Contender("sparsify", _products(_sparsify_search), package="eai-sparsify"),
    ),
    _judge_products,
    {
        "forward": lambda s: Work(2.0 * s.n * s.k * s.d, s.dtype.itemsize * (s.n + s.k) * s.d + 12 * s.n * s.kept),
        "backward": lambda s: Work(
            4.0 * s.n * s.kept * s.d, s.dtype.itemsize * 2 * (s.n + s.k) * s.d + 12 * s.n * s.kept
        ),
    },
)


def _state(inputs: Inputs) -> dict[str, Tensor]:
    """Parameters of a layer, by their names in its state_dict."""
    codes = inputs.codes
    return {
        "W_dec": torch.nn.functional.normalize(codes.flip(0), dim=1),
        "b_dec": 0.1 * inputs.grad[0],
        "encoder.weight": codes,
        "encoder.bias": codes[:, 0].contiguous(),
    }


# From x, W_dec, b_dec, weight and bias of the encoder, and k to the reconstruction, values and indices.
_Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _autoencoder(choose: Callable[[Inputs], tuple[Callable[[], Any], list[Tensor]]]) -> Callable[[Inputs], Call]:
    """`choose` gives a forward and its parameters, in the order of `_state`; x learns nothing, as in training."""

    def prepare(inputs: Inputs) -> Call:
        forward, learned = choose(inputs)
        return Call(
            forward,
            lambda out: torch.autograd.grad(out[0], learned, inputs.grad),
            lambda out: tuple(each.detach() for each in out),
        )

    return prepare


def _ours(inputs: Inputs) -> tuple[Callable[[], Any], list[Tensor]]:
    layer = dlvae.SparseAutoencoder(inputs.size.d, inputs.size.k, inputs.size.kept).to(inputs.x)
    layer.load_state_dict(_state(inputs))
    return lambda: layer(inputs.x), list(layer.parameters())


def _function(choose: Callable[[Inputs], _Forward]) -> Callable[[Inputs], tuple[Callable[[], Any], list[Tensor]]]:
    def prepare(inputs: Inputs) -> tuple[Callable[[], Any], list[Tensor]]:
        learned = [each.clone().requires_grad_() for each in _state(inputs).values()]
        forward = choose(inputs)
        return lambda: forward(inputs.x, *learned, inputs.size.kept), learned

    return prepare


def _plain(
    x: Tensor, decoder: Tensor, decoder_bias: Tensor, weight: Tensor, bias: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    active = linear(x - decoder_bias, weight, bias).relu()
    values, indices = active.topk(k, dim=1)
    kept = torch.zeros_like(active).scatter(1, indices, values)
    return kept @ decoder + decoder_bias, values, indices


def _sparsify(inputs: Inputs) -> _Forward:
    encode, decode = baselines.sparsify_encoder(inputs), baselines.sparsify_decoder(inputs)

    def forward(
        x: Tensor, decoder: Tensor, decoder_bias: Tensor, weight: Tensor, bias: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, indices = encode(x - decoder_bias, weight, bias, k)
        return decode(values.to(decoder.dtype), indices, decoder) + decoder_bias, values, indices

    return forward


def _sparsify_autocast(inputs: Inputs) -> _Forward:
    """In bfloat16, as its trainer runs."""
    forward = _sparsify(inputs)
    return torch.autocast(inputs.x.device.type, torch.bfloat16)(forward)


def _judge_autoencoder(inputs: Inputs, answer: tuple[Tensor, ...], gradients: Any, tolerance: Tolerance) -> Verdict:
    """Reconstruction and gradients are judged given the indices."""
    reconstruction, values, indices = answer
    decoder, decoder_bias, weight, bias = (each.double() for each in _state(inputs).values())
    x, grad = inputs.x.double() - decoder_bias, inputs.grad.double()
    found = judge.largest_products(x, weight, bias, (indices, values), tolerance)
    if found.wrong:
        return found

    def dense(kept: Tensor) -> Tensor:
        return kept.new_zeros(len(x), len(weight)).scatter_(1, indices, kept)

    active = torch.addmm(bias, x, weight.T).gather(1, indices).relu()
    coefficients = dense(active)
    grad_products = dense((grad @ decoder.T).gather(1, indices) * (active > 0))
    exact = (
        coefficients @ decoder + decoder_bias,
        coefficients.T @ grad,
        grad.sum(0) - (grad_products @ weight).sum(0),
        grad_products.T @ x,
        grad_products.sum(0),
    )
    rest = judge.close(exact, (reconstruction, *(gradients or ())), tolerance)
    return Verdict(found.differing, rest.error, rest.wrong)


SPARSE_AUTOENCODER = Entry(
    "SparseAutoencoder",
    "tests/layers/test_sparse_autoencoder.py",
    ("topk_codes", "sparse_decode_fwd", "sparse_decode_bwd", "gather_codes_bwd"),
    {"cpu": (SAE_SMALL,), "cuda": (SAE,)},
    (
        Contender("dlvae_kernels", _autoencoder(_ours), exact=True),
        Contender("plain PyTorch", _autoencoder(_function(lambda inputs: _plain))),
        Contender("sparsify", _autoencoder(_function(_sparsify)), package="eai-sparsify"),
        Contender(
            "sparsify, autocast",
            _autoencoder(_function(_sparsify_autocast)),
            precision="bfloat16",
            package="eai-sparsify",
        ),
    ),
    _judge_autoencoder,
    {
        "forward": lambda s: _work(s, 2.0 * s.n * s.d * (s.k + s.kept), 2),
        "backward": lambda s: _work(s, 8.0 * s.n * s.d * s.kept, 4),
    },
)


def _work(size: Size, flops: float, tensors: int) -> Work:
    """Moves so many tensors of rows and as many of atoms, and the kept values with their indices."""
    return Work(flops, size.dtype.itemsize * tensors * (size.n + size.k) * size.d + 12 * size.n * size.kept)

"""The registry: one entry an operation here, the layers in `layers.py`, whole steps in `training.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dlvae_kernels as dlvae

from . import baselines, judge
from .baselines import compiled
from .entry import Call, Contender, Entry, Inputs, Size, Tolerance, Verdict, Work
from .layers import LAYERS
from .sizes import (
    CIFAR,
    DAC,
    DICTIONARY,
    ENCODEC,
    FEATURES,
    FINE,
    GROWTH,
    IBQ,
    KMEANS,
    LARGEST,
    LASER,
    LLAMAGEN,
    MIMI,
    SAE,
    SEMANTIC,
    VAR,
    VQGAN,
    VQVAE2,
    WIDE,
    WIDE_SMALL,
    half,
)
from .sparse_coding import SPARSE_AUTOENCODER, TOPK_PRODUCTS
from .training import TRAINING


def _ours(prepare: Callable[[Inputs], Call]) -> tuple[Contender, Contender]:
    """Ours as it chooses a backend, and on a GPU the kernels in CUDA C++, to which it prefers Triton's."""
    return (
        Contender("dlvae_kernels", prepare, exact=True),
        Contender("dlvae_kernels, CUDA C++", lambda inputs: baselines.in_cuda_cpp(prepare, inputs), exact=True),
    )


def _search(function: Callable[[Tensor, Tensor], Any]) -> Callable[[Inputs], Call]:
    return lambda inputs: Call(lambda: function(inputs.x, inputs.codes))


def _compiled_search(function: Callable[..., Any]) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        fast, args = compiled(function), (inputs.x, inputs.codes)
        return Call(lambda: fast(*args))

    return prepare


def _pairs(size: Size) -> float:
    return 2.0 * size.n * size.k * size.d


def _bytes(size: Size, *, floats: float, indices: float = 0, words: float = 0) -> float:
    """Of elements in the dtype of the inputs, of int64 indices, of float32 words."""
    return floats * size.dtype.itemsize + 8 * indices + 4 * words


NEAREST_CODE = Entry(
    "nearest_code",
    "tests/functional/test_nearest_code.py",
    ("nearest_code",),
    {
        "cpu": (
            *(CIFAR, FEATURES, WIDE_SMALL, FINE, VQGAN, LLAMAGEN, VAR, ENCODEC, DAC, MIMI, SEMANTIC),
            *GROWTH["cpu"],
        ),
        "cuda": (
            *(CIFAR, WIDE, VQGAN, LLAMAGEN, half(WIDE), ENCODEC, MIMI, KMEANS, half(KMEANS), IBQ, VAR, DAC, SEMANTIC),
            *(VQVAE2, *GROWTH["cuda"], LARGEST),
        ),
    },
    (
        *_ours(_search(dlvae.nearest_code)),
        Contender("plain PyTorch", _search(baselines.argmin)),
        Contender("plain PyTorch, tf32", baselines.argmin_tf32, precision="tf32"),
        Contender("torch.compile", _compiled_search(baselines.argmin)),
        Contender("torch.cdist", _search(lambda x, codes: torch.cdist(x, codes).argmin(1))),
        Contender("faiss-cpu", baselines.faiss_cpu, package="faiss-cpu"),
        Contender("faiss-gpu", baselines.faiss_gpu, package="faiss-gpu"),
        Contender("cuVS", baselines.cuvs, package="cuvs-cu13"),
        Contender("scikit-learn", baselines.scikit_learn, package="scikit-learn"),
        Contender("flash-kmeans", baselines.flash_kmeans_assign, precision="tf32", package="flash-kmeans"),
    ),
    judge.nearest,
    {"forward": lambda s: Work(_pairs(s), _bytes(s, floats=(s.n + s.k) * s.d, indices=s.n))},
)


def _topk(function: Callable[[Tensor, Tensor, int], Any]) -> Callable[[Inputs], Call]:
    return lambda inputs: Call(lambda: function(inputs.x, inputs.codes, inputs.size.kept))


def _topk_compiled(inputs: Inputs) -> Call:
    fast = compiled(baselines.topk)
    return Call(lambda: fast(inputs.x, inputs.codes, inputs.size.kept))


TOPK_CODES = Entry(
    "topk_codes",
    "tests/functional/test_topk_codes.py",
    ("topk_codes",),
    {"cpu": (DICTIONARY, LASER), "cuda": (DICTIONARY, LASER, SAE)},
    (
        *_ours(_topk(dlvae.topk_codes)),
        Contender("plain PyTorch", _topk(baselines.topk)),
        Contender("torch.compile", _topk_compiled),
        Contender("torch.cdist", _topk(baselines.topk_by_cdist)),
        Contender("faiss-cpu", baselines.faiss_cpu, package="faiss-cpu"),
        Contender("faiss-gpu", baselines.faiss_gpu, package="faiss-gpu"),
        Contender("cuVS", baselines.cuvs, package="cuvs-cu13"),
    ),
    judge.topk,
    {
        "forward": lambda s: Work(
            _pairs(s), _bytes(s, floats=(s.n + s.k) * s.d, indices=s.n * s.kept, words=s.n * s.kept)
        )
    },
)


def _one_hot(function: Callable[[Tensor, int], Tensor]) -> Callable[[Inputs], Call]:
    return lambda inputs: Call(lambda: function(inputs.indices[:, 0], inputs.size.k))


def _judge_one_hot(inputs: Inputs, answer: tuple[Tensor, ...], gradients: object, tolerance: Tolerance) -> Verdict:
    same = torch.equal(answer[0].argmax(1), inputs.indices[:, 0]) and bool((answer[0].sum(1) == 1).all())
    return Verdict(None, 0.0 if same else float("inf"), not same)


ONE_HOT = Entry(
    "one_hot",
    "tests/functional/test_one_hot.py",
    ("one_hot",),
    {"cpu": (CIFAR,), "cuda": (CIFAR, VQGAN)},
    (
        *_ours(_one_hot(dlvae.one_hot)),
        Contender("F.one_hot", _one_hot(lambda i, k: torch.nn.functional.one_hot(i, k).float())),
        Contender(
            "scatter_", _one_hot(lambda i, k: torch.zeros(len(i), k, device=i.device).scatter_(1, i[:, None], 1))
        ),
    ),
    _judge_one_hot,
    {"forward": lambda s: Work(0, _bytes(s, floats=0, indices=s.n, words=s.n * s.k))},
)


def _gather(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        codes, indices = inputs.codes.clone().requires_grad_(), inputs.indices[:, 0]
        return Call(lambda: function(codes, indices), lambda out: torch.autograd.grad(out, codes, inputs.grad))

    return prepare


def _judge_gather(inputs: Inputs, answer: tuple[Tensor, ...], gradients: Any, tolerance: Tolerance) -> Verdict:
    indices, codes = inputs.indices[:, 0], inputs.codes.double()
    exact = codes[indices], torch.zeros_like(codes).index_add_(0, indices, inputs.grad.double())
    return judge.close(exact, (*answer, *(gradients or ())), tolerance)


GATHER_CODES = Entry(
    "gather_codes",
    "tests/functional/test_gather_codes.py",
    ("gather_codes_fwd", "gather_codes_bwd"),
    {"cpu": (CIFAR, LLAMAGEN), "cuda": (CIFAR, LLAMAGEN, VQVAE2)},
    (
        *_ours(_gather(dlvae.gather_codes)),
        Contender("F.embedding", _gather(lambda codes, i: torch.nn.functional.embedding(i, codes))),
        Contender("indexing", _gather(lambda codes, i: codes[i])),
    ),
    _judge_gather,
    {
        "forward": lambda s: Work(0, _bytes(s, floats=(s.n + min(s.n, s.k)) * s.d, indices=s.n)),
        "backward": lambda s: Work(0, _bytes(s, floats=(s.n + s.k) * s.d, indices=s.n)),
    },
)


def _quantize(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Callable[[Inputs], Call]:
    """`function` gives quantized rows, indices, and the sum of both losses."""

    def prepare(inputs: Inputs) -> Call:
        leaves = [each.clone().requires_grad_() for each in (inputs.x, inputs.codes)]

        def backward(out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad((out[0], out[2]), leaves, (inputs.grad, torch.ones_like(out[2])))

        return Call(lambda: function(*leaves), backward, lambda out: (out[0].detach(), out[1]))

    return prepare


def _vector_quantize(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = dlvae.vector_quantize(x, codes)
    return out.quantized, out.indices, out.codebook_loss + out.commitment_loss


VECTOR_QUANTIZE = Entry(
    "vector_quantize",
    "tests/functional/test_vector_quantize.py",
    ("vector_quantize_fwd", "vector_quantize_bwd"),
    {"cpu": (CIFAR, LLAMAGEN), "cuda": (CIFAR, WIDE, VQGAN, LLAMAGEN, VQVAE2)},
    (
        *_ours(_quantize(_vector_quantize)),
        Contender("plain PyTorch", _quantize(baselines.quantize)),
        Contender("torch.compile", lambda inputs: _quantize(compiled(baselines.quantize))(inputs)),
        Contender("one-hot matmul", _quantize(baselines.quantize_by_one_hot)),
    ),
    judge.quantized,
    {
        "forward": lambda s: Work(_pairs(s), _bytes(s, floats=(2 * s.n + s.k) * s.d, indices=s.n)),
        "backward": lambda s: Work(0, _bytes(s, floats=(3 * s.n + s.k) * s.d, indices=s.n)),
    },
)


def _ema(function: Callable[..., None]) -> Callable[[Inputs], Call]:
    """`function` takes x, indices, cluster sizes, sums and codebook, and updates the last three in place."""

    def prepare(inputs: Inputs) -> Call:
        codes = inputs.codes.float()
        sizes, sums, codebook = codes.new_ones(len(codes)), codes.clone(), codes.clone()
        indices = inputs.indices[:, 0]
        # The state moves on at each call: the answer is that of the first.
        return Call(
            lambda: function(inputs.x, indices, sizes, sums, codebook), answer=lambda out: (sizes.clone(), sums.clone())
        )

    return prepare


def _ema_update(x: Tensor, indices: Tensor, sizes: Tensor, sums: Tensor, codebook: Tensor) -> None:
    dlvae.ema_update(codebook, sizes, sums, x, indices, decay=0.99, epsilon=1e-5)


def _judge_ema(inputs: Inputs, answer: tuple[Tensor, ...], gradients: object, tolerance: Tolerance) -> Verdict:
    indices, codes = inputs.indices[:, 0], inputs.codes.double()
    counts = torch.bincount(indices, minlength=len(codes)).double()
    total = torch.zeros_like(codes).index_add_(0, indices, inputs.x.double())
    return judge.close((0.99 + 0.01 * counts, 0.99 * codes + 0.01 * total), answer, tolerance)


EMA_UPDATE = Entry(
    "ema_update",
    "tests/functional/test_ema_update.py",
    ("ema_statistics", "ema_step"),
    {"cpu": (CIFAR, VQGAN), "cuda": (CIFAR, VQVAE2, VQGAN, KMEANS)},
    (
        *_ours(_ema(_ema_update)),
        Contender("one-hot matmul", _ema(baselines.ema_by_one_hot)),
        Contender("index_add_", _ema(baselines.ema_by_index_add)),
        Contender("torch.compile", lambda inputs: _ema(compiled(baselines.ema_by_one_hot))(inputs)),
        Contender("flash-kmeans", baselines.flash_kmeans_update, package="flash-kmeans"),
    ),
    _judge_ema,
    {"forward": lambda s: Work(0, _bytes(s, floats=s.n * s.d, indices=s.n, words=5 * s.k * s.d))},
)


def _decode(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        values, dictionary = (each.clone().requires_grad_() for each in (inputs.values, inputs.codes))
        return Call(
            lambda: function(values, inputs.indices, dictionary),
            lambda out: torch.autograd.grad(out, (values, dictionary), inputs.grad),
            lambda out: (out.detach(),),
        )

    return prepare


def _judge_decode(inputs: Inputs, answer: tuple[Tensor, ...], gradients: Any, tolerance: Tolerance) -> Verdict:
    values, codes, grad = (each.double() for each in (inputs.values, inputs.codes, inputs.grad))
    coefficients = values.new_zeros(len(values), len(codes)).scatter_add_(1, inputs.indices, values)
    exact = coefficients @ codes, (grad @ codes.T).gather(1, inputs.indices), coefficients.T @ grad
    return judge.close(exact, (*answer, *(gradients or ())), tolerance)


SPARSE_DECODE = Entry(
    "sparse_decode",
    "tests/functional/test_sparse_decode.py",
    ("sparse_decode_fwd", "sparse_decode_bwd"),
    {"cpu": (DICTIONARY, LASER), "cuda": (DICTIONARY, LASER, SAE)},
    (
        *_ours(_decode(dlvae.sparse_decode)),
        Contender("dense matmul", _decode(baselines.decode_densely)),
        Contender("embedding_bag", _decode(baselines.decode_by_embedding_bag)),
        Contender(
            "sparsify", lambda inputs: _decode(baselines.sparsify_decoder(inputs))(inputs), package="eai-sparsify"
        ),
    ),
    _judge_decode,
    {
        "forward": lambda s: Work(
            2.0 * s.n * s.kept * s.d, _bytes(s, floats=(s.n + s.k) * s.d + s.n * s.kept, indices=s.n * s.kept)
        ),
        "backward": lambda s: Work(
            4.0 * s.n * s.kept * s.d, _bytes(s, floats=(s.n + 2 * s.k) * s.d + 2 * s.n * s.kept, indices=s.n * s.kept)
        ),
    },
)


def _softmax(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[Inputs], Call]:
    """The codes are the weight, scaled to logits of about 1, and their first feature is the bias."""

    def prepare(inputs: Inputs) -> Call:
        x, weight, bias = (each.clone().requires_grad_() for each in _softmax_inputs(inputs))
        return Call(
            lambda: function(x, weight, bias, inputs.indices),
            lambda out: torch.autograd.grad(out, (x, weight, bias), inputs.values.to(out.dtype)),
            lambda out: (out.detach(),),
        )

    return prepare


def _softmax_inputs(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.x, inputs.codes / inputs.size.d**0.5, inputs.codes[:, 0]


def _judge_softmax(inputs: Inputs, answer: tuple[Tensor, ...], gradients: Any, tolerance: Tolerance) -> Verdict:
    leaves = [each.double().requires_grad_() for each in _softmax_inputs(inputs)]
    values = baselines.softmax_at(leaves[0], leaves[1], leaves[2], inputs.indices)
    exact = torch.autograd.grad(values, leaves, inputs.values.double())
    return judge.close((values.detach(), *exact), (*answer, *(gradients or ())), tolerance)


KEPT_SOFTMAX = Entry(
    "kept_softmax",
    "tests/functional/test_kept_softmax.py",
    ("kept_softmax_fwd", "kept_softmax_bwd"),
    {"cpu": (DICTIONARY, LASER), "cuda": (DICTIONARY, LASER)},
    (
        *_ours(_softmax(dlvae.kept_softmax)),
        Contender("plain PyTorch", _softmax(baselines.softmax_at)),
        Contender("torch.compile", lambda inputs: _softmax(compiled(baselines.softmax_at))(inputs)),
    ),
    _judge_softmax,
    {
        "forward": lambda s: Work(
            _pairs(s), _bytes(s, floats=(s.n + s.k) * s.d, indices=s.n * s.kept, words=s.n * s.kept)
        ),
        # Without the logits that are made again.
        "backward": lambda s: Work(
            2 * _pairs(s), _bytes(s, floats=2 * (s.n + s.k) * s.d, indices=s.n * s.kept, words=2 * s.n * s.kept)
        ),
    },
)

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        NEAREST_CODE,
        TOPK_CODES,
        TOPK_PRODUCTS,
        ONE_HOT,
        GATHER_CODES,
        VECTOR_QUANTIZE,
        EMA_UPDATE,
        SPARSE_DECODE,
        KEPT_SOFTMAX,
        *LAYERS,
        SPARSE_AUTOENCODER,
        *TRAINING,
    )
}

"""The registry: the entries of the operations here, of layers in `layers.py`, of training steps in `training.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding, one_hot

import dlvae_kernels as dlvae
from dlvae_kernels.functional import residual_statistics

from . import baselines, judge, sizes
from .calls import Tensors
from .clustering import KMEANS
from .entry import LIBRARY, Entry, Implementation, Signature, Tolerance, Verdict, Work
from .inputs import Inputs
from .layers import LAYERS
from .lookup_free import LOOKUP_FREE_QUANTIZER
from .residual import SEVERAL_CODEBOOKS
from .sizes import half
from .training import TRAINING

# --- nearest_code ---

_SEARCH = Signature(lambda inputs: (inputs.x, inputs.codes))

NEAREST_CODE = Entry(
    "nearest_code",
    "tests/functional/test_nearest_code.py",
    ("nearest_code",),
    {
        "cpu": (
            *(sizes.CIFAR, sizes.FEATURES, sizes.WIDE_SMALL, sizes.FINE, sizes.VQGAN, sizes.LLAMAGEN, sizes.VAR),
            *(sizes.ENCODEC, sizes.DAC, sizes.MIMI, sizes.SEMANTIC, *sizes.GROWTH["cpu"]),
        ),
        "cuda": (
            *(sizes.CIFAR, sizes.WIDE, sizes.VQGAN, sizes.LLAMAGEN, half(sizes.WIDE), sizes.ENCODEC, sizes.MIMI),
            *(sizes.KMEANS, half(sizes.KMEANS), sizes.IBQ, sizes.VAR, sizes.DAC, sizes.SEMANTIC, sizes.VQVAE2),
            *(*sizes.GROWTH["cuda"], sizes.LARGEST),
        ),
    },
    (
        *_SEARCH.library(dlvae.nearest_code),
        _SEARCH.plain("plain PyTorch", baselines.argmin),
        Implementation("plain PyTorch, tf32", baselines.argmin_tf32, precision="tf32"),
        _SEARCH.compiled(baselines.argmin),
        _SEARCH.plain("torch.cdist", lambda x, codes: torch.cdist(x, codes).argmin(1)),
        *baselines.NEIGHBOURS,
        Implementation("scikit-learn", baselines.scikit_learn, package="scikit-learn"),
        Implementation("flash-kmeans", baselines.flash_kmeans_assign, precision="tf32", package="flash-kmeans"),
    ),
    judge.nearest,
    Work(pairs=1, vectors=1, codes=1, indices=1),
)


# --- topk_codes ---

_TOPK = Signature(lambda inputs: (inputs.x, inputs.codes, inputs.size.selected))


TOPK_CODES = Entry(
    "topk_codes",
    "tests/functional/test_topk_codes.py",
    ("topk_codes",),
    {"cpu": (sizes.DICTIONARY, sizes.LASER), "cuda": (sizes.DICTIONARY, sizes.LASER, sizes.SAE)},
    (
        *_TOPK.library(dlvae.topk_codes),
        _TOPK.plain("plain PyTorch", baselines.topk),
        _TOPK.compiled(baselines.topk),
        _TOPK.plain("torch.cdist", baselines.topk_by_cdist),
        *baselines.NEIGHBOURS,
    ),
    judge.topk,
    Work(pairs=1, vectors=1, codes=1, indices=1, float32_values=1),
)


# --- topk_codes with metric="dot", forward and backward ---


def _same_for_a_vector(inputs: Inputs) -> Tensor:
    """A gradient [N, k] that is the same for all values of a vector, so that their order does not matter."""
    return inputs.values[:, :1].repeat(1, inputs.size.selected)


_PRODUCTS = Signature(_TOPK.arguments, (0, 1), _same_for_a_vector, outputs=(1,), answer=(0, 1))


def _sparsify_search(inputs: Inputs) -> Callable[..., tuple[Tensor, Tensor]]:
    encode = baselines.sparsify_encoder(inputs)
    return lambda x, codes, k: encode(x, codes, None, k)[::-1]


def _judge_products(inputs: Inputs, answer: Tensors, gradients: Tensors, tolerance: Tolerance) -> Verdict:
    """Judge the indices first, then the gradients at these indices."""
    indices, values = answer
    found = judge.largest_products(inputs.x.double(), inputs.codes.double(), None, (indices, values), tolerance)
    if found.wrong:
        return found
    _, exact = judge.differentiated(
        lambda x, codes: (x @ codes.T).gather(1, indices), (inputs.x, inputs.codes), _same_for_a_vector(inputs)
    )
    return found.and_values(judge.close(exact, gradients, tolerance))


TOPK_PRODUCTS = Entry(
    "topk_codes dot",
    "tests/functional/test_topk_codes.py",
    ("topk_codes", "sparse_decode_fwd", "sparse_decode_bwd"),
    {"cpu": (sizes.SAE_SMALL,), "cuda": (sizes.SAE, sizes.DICTIONARY)},
    (
        _PRODUCTS.plain(LIBRARY, partial(dlvae.topk_codes, metric="dot")),
        _PRODUCTS.plain("plain PyTorch", baselines.topk_products),
        _PRODUCTS.chosen("sparsify", _sparsify_search, package="eai-sparsify"),
    ),
    _judge_products,
    Work(pairs=1, vectors=1, codes=1, indices=1, float32_values=1),
    Work(selected=2, vectors=2, codes=2, indices=1, float32_values=1),
)


# --- one_hot ---

_ONE_HOT = Signature(lambda inputs: (inputs.indices[:, 0], inputs.size.k))

ONE_HOT = Entry(
    "one_hot",
    "tests/functional/test_one_hot.py",
    ("one_hot",),
    {"cpu": (sizes.CIFAR,), "cuda": (sizes.CIFAR, sizes.VQGAN)},
    (
        *_ONE_HOT.library(dlvae.one_hot),
        _ONE_HOT.plain("F.one_hot", lambda i, k: one_hot(i, k).float()),
        _ONE_HOT.plain("scatter_", lambda i, k: torch.zeros(len(i), k, device=i.device).scatter_(1, i[:, None], 1)),
    ),
    judge.equals(_ONE_HOT(one_hot)),
    Work(indices=1, float32_one_hot=1),
)


# --- gather_codes ---

_GATHER = Signature(lambda inputs: (inputs.codes, inputs.indices[:, 0]), learned=(0,))

GATHER_CODES = Entry(
    "gather_codes",
    "tests/functional/test_gather_codes.py",
    ("gather_codes_fwd", "gather_codes_bwd"),
    {"cpu": (sizes.CIFAR, sizes.LLAMAGEN), "cuda": (sizes.CIFAR, sizes.LLAMAGEN, sizes.VQVAE2)},
    (
        *_GATHER.library(dlvae.gather_codes),
        _GATHER.plain("F.embedding", lambda codes, i: embedding(i, codes)),
        _GATHER.plain("indexing", lambda codes, i: codes[i]),
    ),
    judge.equals(_GATHER(lambda codes, i: codes[i])),
    Work(vectors=1, assigned_codes=1, indices=1),
    Work(vectors=1, codes=1, indices=1),
)


# --- vector_quantize: functions return quantized vectors, indices, and the sum of both losses ---

_QUANTIZE = Signature(_SEARCH.arguments, (0, 1), outputs=(0, 2), answer=(0, 1))


def _vector_quantize(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = dlvae.vector_quantize(x, codes)
    return out.quantized, out.indices, out.codebook_loss + out.commitment_loss


VECTOR_QUANTIZE = Entry(
    "vector_quantize",
    "tests/functional/test_vector_quantize.py",
    ("vector_quantize_fwd", "vector_quantize_bwd"),
    {
        "cpu": (sizes.CIFAR, sizes.LLAMAGEN),
        "cuda": (sizes.CIFAR, sizes.WIDE, sizes.VQGAN, sizes.LLAMAGEN, sizes.VQVAE2),
    },
    (
        *_QUANTIZE.library(_vector_quantize),
        _QUANTIZE.plain("plain PyTorch", baselines.quantize),
        _QUANTIZE.compiled(baselines.quantize),
        _QUANTIZE.plain("one-hot matmul", baselines.quantize_by_one_hot),
    ),
    judge.quantized,
    Work(pairs=1, vectors=2, codes=1, indices=1),
    Work(vectors=3, codes=1, indices=1),
)


# --- residual_quantize: functions return quantized vectors, the indices of all levels, and the sum of all losses ---

_LEVELS = Signature(lambda inputs: (inputs.x, inputs.codebooks))
_RESIDUAL = Signature(_LEVELS.arguments, (0, 1), outputs=(0, 2), answer=(0, 1))
_LUCIDRAINS = "vector-quantize-pytorch"


def _residual_quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # "each" is the gradient of the baselines; the others cost the same or are rotations.
    out = dlvae.residual_quantize(x, codebooks, gradient="each")
    return out.quantized, out.indices, (out.codebook_loss + out.commitment_loss).sum()


RESIDUAL_QUANTIZE = Entry(
    "residual_quantize",
    "tests/functional/test_residual_quantize.py",
    ("residual_quantize_fwd", "residual_quantize_bwd"),
    {"cpu": (sizes.ENCODEC_LEVELS,), "cuda": (sizes.ENCODEC_LEVELS,)},
    (
        *_RESIDUAL.library(_residual_quantize),
        _RESIDUAL.plain("plain PyTorch", baselines.quantize_residuals),
        _RESIDUAL.compiled(baselines.quantize_residuals),
        _RESIDUAL.chosen(_LUCIDRAINS, partial(baselines.lucidrains_residual, training=True), package=_LUCIDRAINS),
    ),
    judge.residual_quantized,
    Work(level_pairs=1, vectors=2, level_codes=1, indices=1),
    Work(vectors=3, level_codes=2, indices=1),
)

RESIDUAL_QUANTIZE_EVAL = Entry(
    "residual_quantize eval",
    "tests/functional/test_residual_quantize.py",
    ("residual_quantize_fwd",),
    {"cpu": (sizes.ENCODEC_LEVELS, sizes.MIMI_LEVELS), "cuda": (sizes.ENCODEC_LEVELS, sizes.MIMI_LEVELS)},
    (
        *_LEVELS.library(_residual_quantize),
        _LEVELS.plain("plain PyTorch", torch.inference_mode()(baselines.quantize_residuals)),
        _LEVELS.chosen(
            _LUCIDRAINS,
            lambda inputs: torch.inference_mode()(baselines.lucidrains_residual(inputs, training=False)),
            package=_LUCIDRAINS,
        ),
    ),
    judge.residual_quantized,
    Work(level_pairs=1, vectors=2, level_codes=1, indices=1),
)


_STATISTICS = Signature(lambda inputs: (inputs.x, inputs.indices, inputs.codebooks))

RESIDUAL_STATISTICS = Entry(
    "residual_statistics",
    "tests/functional/test_residual_quantize.py",
    ("residual_statistics",),
    {"cpu": (sizes.ENCODEC_LEVELS,), "cuda": (sizes.ENCODEC_LEVELS,)},
    (
        *_STATISTICS.library(residual_statistics),
        _STATISTICS.plain("index_add_", baselines.residual_statistics),
    ),
    judge.equals(_STATISTICS(baselines.residual_statistics)),
    Work(vectors=1, level_codes=2, indices=1),
)


# --- rotation_trick: q are the codes of random indices ---

_ROTATION = Signature(lambda inputs: (inputs.x, inputs.codes[inputs.indices[:, 0]]), learned=(0,))

ROTATION_TRICK = Entry(
    "rotation_trick",
    "tests/functional/test_rotation_trick.py",
    ("rotation_trick_bwd",),
    {"cpu": (sizes.CIFAR, sizes.ENCODEC), "cuda": (sizes.CIFAR, sizes.VQVAE2)},
    (
        *_ROTATION.library(dlvae.rotation_trick),
        _ROTATION.plain("plain PyTorch", baselines.rotate),
        _ROTATION.compiled(baselines.rotate),
    ),
    judge.equals(_ROTATION(baselines.rotate)),
    Work(vectors=2),
    Work(vectors=4),
)


# --- ema_update: functions update sizes, sums and codebook in place, and return sizes and sums ---


def _ema_arguments(inputs: Inputs) -> Tensors:
    codes = inputs.codes.to(torch.promote_types(inputs.codes.dtype, torch.float32))
    return inputs.x, inputs.indices[:, 0], codes.new_ones(len(codes)), codes.clone(), codes.clone()


def _ema_update(x: Tensor, indices: Tensor, sizes: Tensor, sums: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    dlvae.ema_update(codebook, sizes, sums, x, indices, decay=0.99, epsilon=1e-5)
    return sizes, sums


_EMA = Signature(_ema_arguments)

EMA_UPDATE = Entry(
    "ema_update",
    "tests/functional/test_ema_update.py",
    ("ema_statistics", "ema_step"),
    {"cpu": (sizes.CIFAR, sizes.VQGAN), "cuda": (sizes.CIFAR, sizes.VQVAE2, sizes.VQGAN, sizes.KMEANS)},
    (
        *_EMA.library(_ema_update),
        _EMA.plain("one-hot matmul", baselines.ema_by_one_hot),
        _EMA.plain("index_add_", baselines.ema_by_index_add),
        _EMA.compiled(baselines.ema_by_one_hot),
        Implementation("flash-kmeans", baselines.flash_kmeans_update, package="flash-kmeans"),
    ),
    judge.equals(_EMA(baselines.ema_by_index_add)),
    Work(vectors=1, indices=1, float32_codes=5),
)


# --- sparse_decode ---

_DECODE = Signature(lambda inputs: (inputs.values, inputs.indices, inputs.codes), learned=(0, 2))


SPARSE_DECODE = Entry(
    "sparse_decode",
    "tests/functional/test_sparse_decode.py",
    ("sparse_decode_fwd", "sparse_decode_bwd"),
    {"cpu": (sizes.DICTIONARY, sizes.LASER), "cuda": (sizes.DICTIONARY, sizes.LASER, sizes.SAE)},
    (
        *_DECODE.library(dlvae.sparse_decode),
        _DECODE.plain("dense matmul", baselines.decode_densely),
        _DECODE.plain("embedding_bag", baselines.decode_by_embedding_bag),
        _DECODE.chosen("sparsify", baselines.sparsify_decoder, package="eai-sparsify"),
    ),
    judge.equals(_DECODE(baselines.decode_densely)),
    Work(selected=1, vectors=1, codes=1, values=1, indices=1),
    Work(selected=2, vectors=1, codes=2, values=2, indices=1),
)


# --- kept_softmax: the weight is the codes, scaled to logits of about 1, and the bias is their first feature ---

_SOFTMAX = Signature(
    lambda inputs: (inputs.x, inputs.codes / inputs.size.d**0.5, inputs.codes[:, 0], inputs.indices),
    learned=(0, 1, 2),
    gradient=lambda inputs: inputs.values,
)


KEPT_SOFTMAX = Entry(
    "kept_softmax",
    "tests/functional/test_kept_softmax.py",
    ("kept_softmax_fwd", "kept_softmax_bwd"),
    {"cpu": (sizes.DICTIONARY, sizes.LASER), "cuda": (sizes.DICTIONARY, sizes.LASER)},
    (
        *_SOFTMAX.library(dlvae.kept_softmax),
        _SOFTMAX.plain("plain PyTorch", baselines.softmax_at),
        _SOFTMAX.compiled(baselines.softmax_at),
    ),
    judge.equals(_SOFTMAX(baselines.softmax_at)),
    Work(pairs=1, vectors=1, codes=1, indices=1, float32_values=1),
    # The logits that the backward pass recomputes do not count.
    Work(pairs=2, vectors=2, codes=2, indices=1, float32_values=2),
)

# --- code_entropy: the temperature makes logits of about 1 ---

_ENTROPY = Signature(lambda inputs: (inputs.x, inputs.codes, 2.0 * inputs.size.d), learned=(0, 1), outputs=(0, 1))


def _code_entropy(x: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    out = dlvae.code_entropy(x, codes, temperature=temperature)
    return out.per_sample, out.batch


CODE_ENTROPY = Entry(
    "code_entropy",
    "tests/functional/test_code_entropy.py",
    ("code_entropy_fwd", "code_entropy_bwd"),
    {"cpu": (sizes.SOFT,), "cuda": (sizes.SOFT, sizes.VQGAN)},
    (
        *_ENTROPY.library(_code_entropy),
        _ENTROPY.plain("plain PyTorch", baselines.entropies),
        _ENTROPY.compiled(baselines.entropies),
    ),
    judge.equals(_ENTROPY(baselines.entropies)),
    Work(pairs=1, vectors=1, codes=1),
    # The logits that the backward pass recomputes do not count.
    Work(pairs=2, vectors=2, codes=2),
)

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *(NEAREST_CODE, TOPK_CODES, TOPK_PRODUCTS, ONE_HOT, GATHER_CODES),
        *(RESIDUAL_QUANTIZE, RESIDUAL_QUANTIZE_EVAL, RESIDUAL_STATISTICS),
        *(VECTOR_QUANTIZE, ROTATION_TRICK, EMA_UPDATE, SPARSE_DECODE, KEPT_SOFTMAX, KMEANS, CODE_ENTROPY),
        *(*LAYERS, *SEVERAL_CODEBOOKS, LOOKUP_FREE_QUANTIZER, *TRAINING),
    )
}

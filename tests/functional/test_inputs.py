"""Inputs that are not dense tensors: each function and layer says what to pass instead."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dlvae_kernels import (
    DictionaryLearning,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    SparseAutoencoder,
    VectorQuantizer,
    VectorQuantizerEMA,
    bit_entropy,
    code_entropy,
    ema_update,
    gather_codes,
    kept_softmax,
    nearest_code,
    one_hot,
    residual_decode,
    residual_quantize,
    rotation_trick,
    sparse_decode,
    topk_codes,
    vector_quantize,
)
from dlvae_kernels.functional import checks, ema_statistics, residual_statistics

OPS = ("nearest_code", "topk_codes", "vector_quantize_fwd", "gather_codes_fwd", "ema_statistics")
X, CODES, INDICES = torch.randn(5, 4), torch.randn(3, 4), torch.zeros(5).long()
BOOKS, LEVELS = torch.randn(2, 3, 4), torch.zeros(5, 2).long()
VALUES, SELECTED = torch.randn(5, 2), torch.zeros(5, 2).long()

# The name of an argument, a good value of it, and a call of it.
CALLS = {
    "nearest_code": ("x", X, lambda bad: nearest_code(bad, CODES)),
    "nearest_code, codebook": ("codebook", CODES, lambda bad: nearest_code(X, bad)),
    "vector_quantize": ("x", X, lambda bad: vector_quantize(bad, CODES)),
    "topk_codes": ("dictionary", CODES, lambda bad: topk_codes(X, bad, 2)),
    "topk_codes, bias": ("bias", CODES[:, 0], lambda bad: topk_codes(X, CODES, 2, metric="dot", bias=bad)),
    "gather_codes": ("codebook", CODES, lambda bad: gather_codes(bad, INDICES)),
    "gather_codes, indices": ("indices", INDICES, lambda bad: gather_codes(CODES, bad)),
    "one_hot": ("indices", INDICES, lambda bad: one_hot(bad, 3)),
    "residual_quantize": ("x", X, lambda bad: residual_quantize(bad, BOOKS)),
    "residual_quantize, codebooks": ("codebooks", BOOKS, lambda bad: residual_quantize(X, bad)),
    "residual_statistics": ("indices", LEVELS, lambda bad: residual_statistics(X, bad, BOOKS)),
    "residual_decode": ("indices", LEVELS, lambda bad: residual_decode(BOOKS, bad)),
    "rotation_trick": ("x", X, lambda bad: rotation_trick(bad, X)),
    "rotation_trick, q": ("q", X, lambda bad: rotation_trick(X, bad)),
    "sparse_decode": ("values", VALUES, lambda bad: sparse_decode(bad, SELECTED, CODES)),
    "code_entropy": ("x", X, lambda bad: code_entropy(bad, CODES)),
    "code_entropy, codebook": ("codebook", CODES, lambda bad: code_entropy(X, bad)),
    "kept_softmax": ("x", X, lambda bad: kept_softmax(bad, CODES, None, SELECTED)),
    "kept_softmax, bias": ("bias", CODES[:, 0], lambda bad: kept_softmax(X, CODES, bad, SELECTED)),
    "bit_entropy": ("logits", X, bit_entropy),
    "ema_statistics": ("x", X, lambda bad: ema_statistics(bad, INDICES, 3)),
    "ema_update, embed_sum": (
        "embed_sum",
        CODES,
        lambda bad: ema_update(CODES.clone(), torch.ones(3), bad, X, INDICES, decay=0.9, epsilon=1e-5),
    ),
    "VectorQuantizer": ("inputs", X, VectorQuantizer(3, 4, 0.25)),
    "VectorQuantizerEMA": ("inputs", X, VectorQuantizerEMA(3, 4, 0.25, 0.9)),
    "VectorQuantizer.decode": ("indices", INDICES, VectorQuantizer(3, 4, 0.25).decode),
    "DictionaryLearning": ("x", X, DictionaryLearning(4, 3, 0.1, 2)),
    "SparseAutoencoder": ("x", X, SparseAutoencoder(4, 3, 2)),
    "FiniteScalarQuantizer": ("inputs", X, FiniteScalarQuantizer([5, 4, 4, 4])),
    "FiniteScalarQuantizer.decode": ("indices", INDICES, FiniteScalarQuantizer([5, 4]).decode),
    "LookupFreeQuantizer": ("inputs", X, LookupFreeQuantizer(16)),
}
KINDS = {
    "numpy": (lambda good: good.numpy(), r"to be a torch.Tensor, got numpy.ndarray; pass torch.as_tensor\("),
    "list": (lambda good: good.tolist(), r"to be a torch.Tensor, got list; pass torch.as_tensor\("),
    "sparse": (
        lambda good: good.to_sparse(),
        r"to be a dense tensor, got one of layout torch.sparse_coo; pass \w+.to_dense\(\)",
    ),
    "nested": (
        lambda good: torch.nested.nested_tensor([good, good], layout=torch.jagged),
        r"to be a dense tensor, got a nested tensor; pass \w+.values\(\) or a padded tensor",
    ),
    "none": (lambda good: None, "to be a torch.Tensor, got NoneType"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_input_no_dense_tensor_raises_the_remedy(call, kind):
    name, good, function = CALLS[call]
    if kind == "none" and name == "bias":
        pytest.skip("a bias may be None")
    make, message = KINDS[kind]
    function(good)
    with pytest.raises(ValueError, match=f"^expected {name} {message}"):
        function(make(good))


def test_input_on_a_device_without_float64_raises_the_remedy():
    class OnMps(Tensor):
        device = torch.device("mps")
        is_mps = True

    with pytest.raises(ValueError, match=r"expected x on a device that has float64, got mps; pass x.cpu\(\)"):
        checks.check_tensor("x", OnMps())


def test_sizes_numpy_integers_are_accepted():
    assert torch.equal(one_hot(INDICES, np.int64(3)), one_hot(INDICES, 3))
    assert torch.equal(topk_codes(X, CODES, np.int32(2))[0], topk_codes(X, CODES, 2)[0])
    assert torch.equal(ema_statistics(X, INDICES, np.int64(3)), ema_statistics(X, INDICES, 3))


@pytest.mark.every_isa
# More dimensions than kernels may join into one or two. Triton's kernels copy an input of more than two, of any number.
@pytest.mark.parametrize("dimensions", [6, *(pytest.param(number, marks=pytest.mark.large) for number in (13, 14))])
def test_input_many_dimensions_of_any_strides_equals_its_vectors(device, dimensions):
    x = torch.randn([2] * dimensions, device=device).permute(*range(dimensions)[::-1])
    codebook = torch.randn(5, 2, device=device)
    vectors = x.reshape(-1, 2)
    indices = nearest_code(x, codebook)
    assert torch.equal(indices.flatten(), nearest_code(vectors, codebook))
    assert torch.equal(topk_codes(x, codebook, 3)[0].flatten(0, -2), topk_codes(vectors, codebook, 3)[0])
    out, like = vector_quantize(x, codebook), vector_quantize(vectors, codebook)
    assert torch.equal(out.quantized.reshape(-1, 2), like.quantized)
    torch.testing.assert_close(out.codebook_loss, like.codebook_loss)
    assert torch.equal(gather_codes(codebook, indices).reshape(-1, 2), gather_codes(codebook, indices.flatten()))
    statistics = ema_statistics(x, indices, 5)
    torch.testing.assert_close(statistics, ema_statistics(vectors, indices.flatten(), 5), rtol=1e-4, atol=1e-3)


@pytest.mark.every_isa
def test_input_expanded_equals_its_copy(device):
    x = torch.randn(1, 4, device=device).expand(3, 7, 4)
    codebook = torch.randn(5, 4, device=device)
    assert torch.equal(nearest_code(x, codebook), nearest_code(x.contiguous(), codebook))
    assert torch.equal(ema_statistics(x, INDICES.new_zeros(3, 7, device=device), 5)[0, -1].cpu(), torch.tensor(21.0))
    # Features may be expanded too.
    x = torch.randn(9, 1, device=device).expand(9, 4)
    assert torch.equal(topk_codes(x, codebook, 3)[0], topk_codes(x.contiguous(), codebook, 3)[0])

"""SimVQ and ResidualSimVQ of the compatibility package against vector-quantize-pytorch, and what is mended."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own
from dlvae_kernels.testing import assert_same_codes

from .comparison import compare

D, K, L = 8, 24, 4
stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")


def mlp(frozen_dim: int = D) -> nn.Module:
    return nn.Sequential(nn.Linear(frozen_dim, 12), nn.ReLU(), nn.Linear(12, D))


SIM_VQ = {
    "defaults": ({}, (2, 10, D)),
    "straight_through": ({"rotation_trick": False}, (2, 10, D)),
    "channel_first_image": ({"channel_first": True}, (2, D, 4, 5)),
    "channel_last_image": ({}, (2, 4, 5, D)),
    "one_vector_each": ({"channel_first": True}, (6, D)),
    "frozen_codebook_dim": ({"frozen_codebook_dim": 5}, (2, 10, D)),
    "weights": ({"input_to_quantize_commit_loss_weight": 0.7, "commitment_weight": 3.0}, (2, 10, D)),
    "no_commitment": ({"input_to_quantize_commit_loss_weight": 0, "commitment_weight": 0.5}, (2, 10, D)),
    "codebook_transform": (lambda: {"codebook_transform": mlp(3), "frozen_codebook_dim": 3}, (2, 10, D)),
    "init_fn": ({"init_fn": lambda codes: codes.sign() * 0.3}, (2, 10, D)),
}
RESIDUAL = {
    "defaults": ({}, (2, 10, D), {}),
    "straight_through": ({"rotation_trick": False}, (2, 10, D), {}),
    "channel_first_image": ({"channel_first": True}, (2, D, 4, 5), {"return_all_codes": True}),
    "channel_last_image": ({}, (2, 4, 5, D), {"return_all_codes": True}),
    "dropout": ({"quantize_dropout": True}, (2, 10, D), {}),
    "dropout_with_a_seed": (
        {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
        (2, 10, D),
        {"rand_quantize_dropout_fixed_seed": 5, "return_all_codes": True},
    ),
    "dropout_by_threes": (
        {"quantize_dropout": True, "quantize_dropout_multiple_of": 3, "channel_first": True},
        (2, D, 10),
        {"rand_quantize_dropout_fixed_seed": 3},
    ),
    "options_of_sim_vq": (
        {"frozen_codebook_dim": 5, "commitment_weight": 2.0, "input_to_quantize_commit_loss_weight": 0.5},
        (2, 10, D),
        {},
    ),
    "shared_transform": (lambda: {"codebook_transform": mlp()}, (2, 10, D), {}),
}


def pair(name: str, options, **sizes) -> tuple[nn.Module, nn.Module]:
    """A module of vector-quantize-pytorch, and that of the compatibility package."""
    both = []
    for package in (stock, own):
        arguments = options() if callable(options) else options
        both.append(getattr(package, name)(dim=D, codebook_size=K, **sizes, **arguments))
    return both[0], both[1]


def sim_vq(**options) -> tuple[nn.Module, nn.Module]:
    like, module = pair("SimVQ", options)
    module.load_state_dict(like.state_dict())
    return like, module


def residual(**options) -> tuple[nn.Module, nn.Module]:
    like, module = pair("ResidualSimVQ", options, num_quantizers=L)
    module.load_state_dict(like.state_dict())
    return like, module


@pytest.mark.parametrize("name", SIM_VQ)
def test_sim_vq_trains_as_vector_quantize_pytorch(name):
    options, shape = SIM_VQ[name]
    compare(*pair("SimVQ", options), [torch.randn(shape) for _ in range(2)])


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_sim_vq_trains_as_vector_quantize_pytorch(name):
    options, shape, arguments = RESIDUAL[name]
    compare(*pair("ResidualSimVQ", options, num_quantizers=L), [torch.randn(shape) for _ in range(2)], **arguments)


@pytest.mark.parametrize("make", [lambda p: p.SimVQ(D, K), lambda p: p.SimVQ(D, K, mlp(), lambda codes: 2 * codes)])
def test_sim_vq_same_seed_gives_the_same_weights(make):
    states = []
    for package in (stock, own):
        torch.manual_seed(3)
        states.append(make(package).state_dict())
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


@pytest.mark.parametrize("channel_first", [False, True])
def test_sim_vq_decodes_as_vector_quantize_pytorch(channel_first):
    indices = torch.randint(K, (2, 4, 5, L))
    like, module = residual(channel_first=channel_first)
    for method in ("get_codes_from_indices", "get_output_from_indices"):
        assert_close(getattr(module, method)(indices), getattr(like, method)(indices))
    assert_close(module.codebooks, like.codebooks)
    assert module.codebook_size == like.codebook_size == K
    level, like_level = module.layers[0], like.layers[0]
    assert_close(level.indices_to_codes(indices[..., 0]), like_level.indices_to_codes(indices[..., 0]))
    assert_close(level.codebook, like_level.codebook)


@pytest.mark.parametrize("channel_first", [False, True])
def test_residual_sim_vq_image_decodes_to_quantized(channel_first):
    _, module = residual(channel_first=channel_first)
    quantized, indices, _, codes = module(torch.randn(2, D, D, D), return_all_codes=True)
    assert_close(module.get_output_from_indices(indices), quantized)
    assert_close(codes.sum(0), quantized)
    assert_close(module.layers[1].indices_to_codes(indices[..., 1]), codes[1])


def test_residual_sim_vq_gradient_is_once_for_each_level():
    _, module = residual(rotation_trick=False, input_to_quantize_commit_loss_weight=0.0)
    x = torch.randn(3, 5, D, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[0].sum(), x)
    assert_close(grad, torch.full_like(x, L))


@pytest.mark.parametrize("rotation_trick", [False, True])
def test_sim_vq_loss_and_gradients_of_a_transform_match_float64(rotation_trick):
    module = own.SimVQ(D, K, mlp(), rotation_trick=rotation_trick, commitment_weight=2.0)
    x = torch.randn(3, 7, D, requires_grad=True)
    _, indices, loss = module(x)
    grads = torch.autograd.grad(loss, [x, *module.parameters()])
    exact, y = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    codes = exact.code_transform(exact.frozen_codebook)[indices]
    expected = 2 * (mse_loss(codes, y.detach()) + 0.25 * mse_loss(codes.detach(), y))
    assert_same_codes(indices, x, module.codebook)
    assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for actual, value in zip(grads, torch.autograd.grad(expected, [y, *exact.parameters()]), strict=True):
        assert_close(actual.double(), value, rtol=1e-4, atol=1e-6)


def test_residual_sim_vq_dropped_levels_have_no_gradient():
    like, module = residual(quantize_dropout=True)
    for each in (like, module):
        out = each(torch.randn(2, 6, D), rand_quantize_dropout_fixed_seed=1)
        out[2].sum().backward()
        has_gradient = [layer.code_transform.weight.grad is not None for layer in each.layers]
        assert has_gradient == (out[1][0, 0] >= 0).tolist()
        assert 0 < sum(has_gradient) < L


# The mended faults: vector-quantize-pytorch fails each of these.


def test_mended_half_precision_modules_work():
    for like, module in (sim_vq(), residual()):
        x = torch.randn(2, 10, D).bfloat16()
        with pytest.raises(NotImplementedError, match="cdist"):
            like.bfloat16()(x)
        quantized, indices, loss = module.bfloat16()(x)
        assert quantized.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        first, codebook = (indices, module.codebook) if loss.ndim == 0 else (indices[..., 0], module.codebooks[0])
        assert_same_codes(first, x.float(), codebook.float())


def test_mended_autocast_searches_in_float32():
    like, module = sim_vq()
    x = torch.randn(4, 500, D)
    expected = module(x)
    with torch.autocast("cpu"):
        found, found_like = module(x), like(x)
    assert torch.equal(found[1], expected[1])
    assert_close(found[2], expected[2])
    assert (found_like[1] != expected[1]).any()


def test_mended_no_code_decodes_to_zeros():
    like, module = sim_vq()
    indices = torch.tensor([[3, -1]])
    assert module.indices_to_codes(indices)[0, 1].eq(0).all()
    assert like.indices_to_codes(indices)[0, 1].ne(0).any()


def test_mended_codebook_dim_is_that_of_the_codes():
    like, module = residual(frozen_codebook_dim=3)
    assert module.codebook_dim == D
    with pytest.raises(AttributeError):
        _ = like.codebook_dim


def test_mended_fewer_levels_decode_without_dropout():
    like, module = residual()
    *_, indices, _, codes = module(torch.randn(2, 6, D), return_all_codes=True)
    assert_close(module.get_output_from_indices(indices[..., :2]), codes[:2].sum(0))
    with pytest.raises(AssertionError):
        like.get_output_from_indices(indices[..., :2])


@pytest.mark.parametrize("shape", [(2, 4, 5, D), (6, D)])
def test_mended_dropout_of_maps_with_features_last(shape):
    like, module = residual(quantize_dropout=True)
    x = torch.randn(shape)
    with pytest.raises(RuntimeError, match="stack expects"):
        like(x, rand_quantize_dropout_fixed_seed=1)
    quantized, indices, losses = module(x, rand_quantize_dropout_fixed_seed=1)
    assert indices.shape == (*shape[:-1], L)
    assert ((indices < 0).flatten(0, -2).all(0) == (losses == 0)).all()
    assert indices[..., -1].eq(-1).all()
    assert_close(module.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("make", [sim_vq, residual])
def test_mended_empty_batch(make):
    like, module = make()
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        like(torch.randn(0, 5, D))
    assert module(torch.randn(0, 5, D))[0].shape == (0, 5, D)


# Surroundings.


@pytest.mark.parametrize("make", [sim_vq, residual])
@pytest.mark.parametrize("rotation_trick", [False, True])
def test_sim_vq_compiles_without_graph_break_and_exports(make, rotation_trick):
    _, module = make(channel_first=True, rotation_trick=rotation_trick)
    x = torch.randn(2, D, 4, 3, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for function in (module, compiled, torch.export.export(module, (x,)).module()):
        out = function(x)
        grads = torch.autograd.grad(out[2].sum() + out[0].square().sum(), [x, *module.parameters()])
        results.append([*out, *grads])
    for result in results[1:]:
        for expected, actual in zip(results[0], result, strict=True):
            assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_residual_sim_vq_dropout_compiles_without_graph_break():
    _, module = residual(quantize_dropout=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    counts = set()
    for _ in range(12):
        x = torch.randn(2, 6, D, requires_grad=True)
        quantized, indices, losses = compiled(x)
        (quantized.sum() + losses.sum()).backward()
        runs = indices[0, 0] >= 0
        counts.add(int(runs.sum()))
        assert ((losses != 0) == runs).all()
        assert_close(module.get_output_from_indices(indices), quantized)
    assert len(counts) > 1


@pytest.mark.parametrize("make", [sim_vq, residual])
def test_sim_vq_copies_and_pickles(make):
    _, module = make(init_fn=lambda codes: codes * 2)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    x = torch.randn(2, 10, D)
    for other in copies:
        assert all(torch.equal(a, b) for a, b in zip(other(x), module(x), strict=True))


def test_sim_vq_error_names_the_remedy():
    _, module = sim_vq()
    with pytest.raises(ValueError, match=r"expected x of shape \[b, ..., 8\], got .*; .* pass channel_first=True"):
        module(torch.randn(2, D, 4, 5))
    _, module = residual(channel_first=True)
    with pytest.raises(ValueError, match=r"expected x of shape \[b, 8, ...\], got .*; .* pass channel_first=False"):
        module(torch.randn(2, 4, 5, D))
    with pytest.raises(ValueError, match=r"with n in \[1, 4\], got"):
        module.get_output_from_indices(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="expected heads=1"):
        own.ResidualSimVQ(dim=D, num_quantizers=2, codebook_size=K, heads=2)
    with pytest.raises(ValueError, match=r"quantize_dropout_cutoff_index in \[0, 4\)"):
        residual(quantize_dropout=True, quantize_dropout_cutoff_index=4)

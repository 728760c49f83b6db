"""Each handler gives the results of the class: equal tokens, values, gradients and modes."""

from __future__ import annotations

import copy

import pytest
import torch

from dlvae_kernels import patch
from dlvae_kernels.patching import residual_stack

from . import models


def both(module, *args, **kwargs):
    """The results of a module and of its patched copy."""
    fast = copy.deepcopy(module)
    assert len(patch(fast).changes) == 1
    return module(*args, **kwargs), fast(*args, **kwargs)


def assert_same(expected, found):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [models.EuclideanCodebook, models.CachedCodebook, models.MotionCodebook])
def test_euclidean_tokens_equal_those_of_the_class(kind):
    module, x = kind(), torch.randn(500, 8)
    expected = module.quantize(x)
    with patch(module) as patched:
        assert [each.handler.method for each in patched.changes] == ["quantize"]
        assert module.quantize(x).equal(expected)


def test_euclidean_temperature_runs_the_class():
    module, x = models.MotionCodebook(), torch.randn(20, 8)
    expected = module.quantize(x, sample_codebook_temp=1.0)
    patch(module)
    assert module.quantize(x, sample_codebook_temp=1.0).equal(expected)
    assert module.quantize(x, sample_codebook_temp=0.0).equal(expected - 1)


def test_euclidean_another_search_is_left_alone():
    patched = patch(models.DotCodebook())
    assert patched.changes == []
    assert patched.left_alone[""] == "its quantize does not give the nearest codes by Euclidean distance"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_euclidean_half_precision_tokens_are_exact(dtype, x_dtype):
    module = models.EuclideanCodebook(512, 8).to(dtype)
    x = torch.randn(300, 8).to(x_dtype)
    patch(module)
    distances = (x.double()[:, None] - module.embed.double()).square().sum(-1)
    assert module.quantize(x).equal(distances.argmin(-1))


def test_cached_codebook_follows_loaded_weights_and_dtype():
    module, other, x = models.CachedCodebook(), models.CachedCodebook(), torch.randn(50, 8)
    patch(module)
    module.quantize(x)
    module.load_state_dict(other.state_dict())
    assert module.quantize(x).equal(other.quantize(x))
    assert module.decode(torch.arange(32)).equal(other.embed)
    module.double()
    module.quantize(x)
    assert module.embed.dtype == torch.float64


@pytest.mark.parametrize("in_one_operation", [False, True])
@pytest.mark.parametrize("num_levels", [None, 3])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", [models.EuclideanCodebook, models.CachedCodebook])
def test_stack_tokens_equal_those_of_the_class(monkeypatch, kind, projection, num_levels, in_one_operation):
    monkeypatch.setattr(residual_stack, "in_one_operation", lambda x: in_one_operation)
    module = models.ResidualStack(kind=kind, projection=projection)
    x = torch.randn(3, 6 if projection else 8, 40)
    expected = module.encode(x, num_quantizers=num_levels)
    # The projection is of the stack, and the levels have none.
    with patch(module) as patched:
        assert patched.changes[0].handler.method == "encode"
        assert module.encode(x, num_quantizers=num_levels).equal(expected)
        assert module.encode(x, num_levels).equal(expected)


def test_stack_not_fused_leaves_encode():
    module = models.ResidualStack()
    assert [each.handler.method for each in patch(module, fused=False).changes] == ["quantize"] * 4


def test_stack_with_projected_levels_is_patched_by_level():
    module = models.ResidualStack()
    module.layers[0].project_in = torch.nn.Linear(8, 8)
    patched = patch(module)
    assert [each.handler.method for each in patched.changes] == ["quantize"] * 4
    assert patched.left_alone == {"": "its levels have projections; their searches are patched one by one"}


def test_stack_half_precision_residual_keeps_its_dtype():
    module, x = models.ResidualStack(8).bfloat16(), torch.randn(2, 8, 40).bfloat16()
    expected = module.encode(x)
    patch(module)
    # The stock search of the test compares in float32, so that both quantize the same residuals.
    assert module.encode(x).equal(expected)


def test_factorized_results_and_gradients_equal_those_of_the_class():
    module, x = models.FactorizedQuantizer(), torch.randn(2, 16, 50, requires_grad=True)
    fast = copy.deepcopy(module)
    patch(fast)
    for expected, found in zip(module(x), fast(x), strict=True):
        assert_same(expected, found)
    grads = [
        torch.autograd.grad(each(x)[0].square().sum() + each(x)[1], [x, *each.parameters()]) for each in (module, fast)
    ]
    assert_same(*grads)


def test_factorized_calls_the_hooks_of_its_codebook():
    module, calls = models.FactorizedQuantizer(), []
    module.codebook.register_forward_hook(lambda *_: calls.append(1))
    patch(module)
    calls.clear()
    module(torch.randn(1, 16, 5))
    assert calls == [1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", ["indices", "taming", "sane", "losses"])
def test_image_results_and_gradients_equal_those_of_the_class(kind, normalised, legacy, training):
    module, z = models.ImageQuantizer(kind, normalised, legacy).train(training), torch.randn(2, 8, 5, 6)
    z.requires_grad_()
    expected, found = both(module, z)
    assert_same(expected, found)
    assert found[0].stride() == expected[0].stride()
    fast = copy.deepcopy(module)
    patch(fast)
    losses = [each(z)[1] for each in (module, fast)]
    if isinstance(losses[0], torch.Tensor):
        grads = [
            torch.autograd.grad(loss, [z, each.embedding.weight])
            for loss, each in zip(losses, (module, fast), strict=True)
        ]
        assert_same(*grads)


@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (2, 3, 8, 5, 6)])
def test_image_grid_equals_that_of_the_class(shape):
    expected, found = both(models.ImageQuantizer("grid"), torch.randn(shape))
    assert found.equal(expected)


def test_image_beta_that_changes_later_is_followed():
    module, z = models.ImageQuantizer("indices"), torch.randn(1, 8, 3, 3)
    patch(module)
    module.beta = 3.0
    assert_same(type(module).forward(module, z), module(z))


def test_image_remapped_or_one_hot_results_are_left_alone():
    module = models.ImageQuantizer("taming")
    module.remap = "file"
    assert patch(module).left_alone == {"": "it maps its indices to others (remap)"}
    assert patch(models.ImageQuantizer("one-hot")).changes == []


def test_image_training_that_differs_runs_the_class():
    module = models.ImageQuantizer("losses").train()
    patch(module)
    assert module(torch.randn(1, 8, 3, 3))[1][-1] == 1


def test_dot_product_equals_that_of_the_class():
    expected, found = both(models.DotQuantizer(), torch.randn(2, 8, 5, 6))
    assert found.equal(expected)


@pytest.mark.parametrize("masked", [False, True])
def test_gumbel_results_and_gradients_equal_those_of_the_class(masked):
    module, x = models.GumbelQuantizer().eval(), torch.randn(3, 20, 8)
    args = (torch.rand(3, 20) < 0.5,) if masked else ()
    fast = copy.deepcopy(module)
    patch(fast)
    # The mask also by name.
    assert_same(module(x, *args), fast(x, **dict(zip(("mask",), args, strict=False))))
    grads = [torch.autograd.grad(each(x, *args)[0].square().sum(), each.codevectors) for each in (module, fast)]
    assert_same(*grads)


def test_gumbel_training_runs_the_class():
    module, x = models.GumbelQuantizer().train(), torch.randn(3, 20, 8)
    patch(module)
    assert module.training
    assert_same(type(module).forward(module, x)[1], module(x)[1])

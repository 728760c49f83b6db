"""The promises of `patch`: nothing of the model changes, all is undone, and what is left alone has a reason."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import nn

import dlvae_kernels
from dlvae_kernels import patch

from . import models


def state_of(model):
    return {id(module): dict(vars(module)) for module in model.modules()}


@pytest.fixture
def model():
    return nn.ModuleDict(
        {
            "stack": models.ResidualStack(kind=models.CachedCodebook),
            "dac": models.FactorizedQuantizer(),
            "image": models.ImageQuantizer("indices"),
            "gumbel": models.GumbelQuantizer(),
            "dot": models.DotQuantizer(),
        }
    )


def test_patch_is_a_function_of_the_package():
    assert callable(dlvae_kernels.patch)


def test_patch_changes_no_tensor_and_undo_restores_all(model):
    before, state = state_of(model), {name: each.clone() for name, each in model.state_dict().items()}
    random = torch.get_rng_state()
    patched = patch(model)
    assert len(patched.changes) == 9
    assert torch.get_rng_state().equal(random)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[name].equal(state[name]) for name in state)
    assert all(each.grad is None and each.requires_grad for each in model.parameters())
    patched.undo()
    patched.undo()
    assert state_of(model) == before
    assert all(not module._load_state_dict_post_hooks for module in model.modules())


def test_patch_as_a_context_undoes_after_an_error(model):
    with pytest.raises(RuntimeError, match="stop"), patch(model):
        raise RuntimeError("stop")
    assert "forward" not in vars(model["image"])


def test_patch_twice_changes_nothing_and_its_undo_leaves_the_first(model):
    with patch(model):
        bound = vars(model["image"])["forward"]
        with patch(model) as inner:
            assert inner.changes == []
            assert set(inner.left_alone.values()) == {"already patched"}
        assert vars(model["image"])["forward"] is bound
    assert "forward" not in vars(model["image"])


def test_patch_shared_module_is_changed_once():
    codebook = models.EuclideanCodebook()
    assert len(patch(nn.ModuleList([codebook, codebook])).changes) == 1


def test_report_lists_changes_and_reasons():
    class OtherQuantizer(nn.Module):
        pass

    model = nn.ModuleDict({"a": models.ResidualStack(), "b": OtherQuantizer(), "c": models.DotCodebook()})
    assert str(patch(model)).splitlines() == [
        "dlvae_kernels.patch: 5 methods replaced",
        "  1 x ResidualStack.encode: all levels in one method, in one operation on a GPU",
        "  4 x EuclideanCodebook.quantize: exact search of the nearest code",
        "  left alone: c: its quantize does not give the nearest codes by Euclidean distance",
        "  left alone: b: no handler knows its methods and state",
    ]


def test_weights_that_change_after_the_patch_are_seen(model):
    stack = models.ResidualStack()
    patch(stack)
    x = torch.randn(1, 8, 20)
    stack.encode(x)
    for level in stack.layers:
        level.codebook.embed.data = torch.randn(32, 8)
    assert stack.encode(x).equal(type(stack).encode(stack, x))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copy_of_a_patched_model_is_patched_and_reads_its_own_weights(model, way):
    patch(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for name, args in {"stack": (1, 8, 9), "dac": (1, 16, 9), "image": (1, 8, 3, 3)}.items():
        x = torch.randn(args)
        (bound,) = [each for each in vars(other[name]).values() if isinstance(each, functools.partial)]
        assert bound.args == (other[name],)
        for each in other[name].buffers():
            each.neg_()
        for each in other[name].parameters():
            each.data.neg_()
        for module in other[name].modules():
            if hasattr(module, "_embed"):
                module._embed = None
        expected = type(other[name]).forward(other[name], x)
        torch.testing.assert_close(other[name](x), expected)
    assert patch(other).changes == []


@pytest.mark.parametrize("kind", [models.EuclideanCodebook, models.CachedCodebook, models.FactorizedQuantizer])
def test_meta_codebook_is_left_alone(kind):
    with torch.device("meta"):
        module = kind()
    assert patch(module).left_alone == {"": "its codebook is on the meta device; load the weights first"}


@pytest.mark.parametrize("kind", [models.EuclideanCodebook, models.FactorizedQuantizer, models.ResidualStack])
def test_codebook_that_is_offloaded_after_the_patch_runs_the_class(monkeypatch, kind):
    module = kind()
    (first, *_) = patch(module).changes
    module.to("meta")
    # The hooks of an offloaded codebook load its weights around the method of the class.
    monkeypatch.setattr(kind, first.handler.method, lambda self, *args: "class")
    assert getattr(module, first.handler.method)(torch.randn(2, 8, 4)) == "class"


def test_codebook_of_equal_codes_is_left_alone():
    module = models.EuclideanCodebook()
    module.embed.zero_()
    assert patch(module).left_alone == {"": "all its codes are equal; load the weights first"}


def test_method_that_was_replaced_on_the_instance_is_left_alone():
    module = models.ImageQuantizer("indices")
    module.forward = lambda z: z
    assert patch(module).left_alone == {"": "its forward was replaced on the instance"}


def test_stack_with_a_level_that_was_replaced_is_left_alone():
    stack = models.ResidualStack()
    stack.layers[1].codebook.quantize = lambda x: x
    patched = patch(stack)
    assert patched.left_alone[""] == "the quantize of a level was replaced on the instance"
    assert [each.handler.method for each in patched.changes] == ["quantize"] * 3


def test_undo_keeps_a_method_that_was_replaced_meanwhile():
    module = models.ImageQuantizer("indices")
    patched = patch(module)
    hooked = module.forward = lambda z: z
    patched.undo()
    assert module.forward is hooked


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (models.ResidualStack, (1, 8, 10)),
        (lambda: models.ResidualStack(kind=models.CachedCodebook), (1, 8, 10)),
        (models.FactorizedQuantizer, (1, 16, 10)),
        (lambda: models.ImageQuantizer("indices"), (1, 8, 4, 4)),
        (lambda: models.GumbelQuantizer().eval(), (1, 10, 8)),
    ],
)
def test_model_compiled_after_the_patch_runs_in_one_graph(model, shape):
    module, x = model(), torch.randn(shape)
    expected = module(x)
    patch(module)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)


def test_compiled_model_is_left_alone():
    model = models.ImageQuantizer("indices")
    reason = "it is compiled; patch the model before torch.compile"
    assert set(patch(torch.compile(model)).left_alone.values()) == {reason}
    model.compile()
    assert patch(model).left_alone == {"": reason}


def test_classes_of_vector_quantize_pytorch_name_compat():
    package = pytest.importorskip("vector_quantize_pytorch")
    patched = patch(package.VectorQuantize(dim=8, codebook_size=16))
    assert patched.changes == []
    assert "compat.install()" in patched.left_alone[""]

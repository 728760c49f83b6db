"""ResidualVQ and GroupedResidualVQ give what those of vector-quantize-pytorch give: results, gradients and state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own

from .comparison import compare

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

LEARNABLE = {"learnable_codebook": True, "ema_update": False}
MASK = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.6
CONFIGURATIONS = {
    "defaults": ({}, {}),
    "all_codes": ({}, {"return_all_codes": True}),
    "codebook_dim": ({"codebook_dim": 4}, {}),
    "cosine": ({"use_cosine_sim": True}, {}),
    "shared": ({"shared_codebook": True}, {}),
    "shared_projected": ({"shared_codebook": True, "codebook_dim": 4}, {}),
    "shared_cosine": ({"shared_codebook": True, "use_cosine_sim": True}, {}),
    "learnable": (LEARNABLE, {}),
    "learnable_frozen": (LEARNABLE, {"freeze_codebook": True}),
    "learnable_shared": ({**LEARNABLE, "shared_codebook": True}, {}),
    "grad_frac": ({"quant_grad_frac": 0.1}, {}),
    "grad_frac_shared": ({"quant_grad_frac": 0.1, "shared_codebook": True}, {}),
    "orthogonal": ({"orthogonal_reg_weight": 1.0}, {}),
    "dropout": ({"quantize_dropout": True}, {}),
    "dropout_multiple": (
        {"quantize_dropout": True, "quantize_dropout_multiple_of": 2, "quantize_dropout_cutoff_index": 1},
        {},
    ),
    "dropout_seed": ({"quantize_dropout": True}, {"rand_quantize_dropout_fixed_seed": 3}),
    "sizes": ({"codebook_size": (16, 8, 4), "num_quantizers": None}, {}),
    "commitment": ({"commitment_weight": 0.25}, {}),
    "no_commitment": ({"commitment_weight": 0.0}, {}),
    "no_ema": ({"ema_update": False}, {}),
    "frozen": ({}, {"freeze_codebook": True}),
    "mask": ({}, {"mask": MASK}),
    "mask_kept": ({"return_zeros_for_masked_padding": False}, {"mask": MASK}),
}
GROUPED = {
    "defaults": ({}, {}),
    "codebook_dim": ({"codebook_dim": 3}, {}),
    "dropout": ({"quantize_dropout": True}, {}),
    "shared": ({"shared_codebook": True}, {}),
    "cosine": ({"use_cosine_sim": True}, {"return_all_codes": True}),
    "mask": ({}, {"mask": MASK}),
}


def inputs(*shape):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


def pair(name, arguments):
    modules = []
    for package in (stock, own):
        torch.manual_seed(0)
        modules.append(getattr(package, name)(**{"dim": 8, "codebook_size": 16, "num_quantizers": 4, **arguments}))
    return modules


@pytest.mark.parametrize("rotation_trick", [True, False], ids=["rotation", "straight_through"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_residual_vq_trains_as_that_of_the_source(name, rotation_trick):
    arguments, options = CONFIGURATIONS[name]
    modules = pair("ResidualVQ", {**arguments, "rotation_trick": rotation_trick})
    compare(*modules, inputs(2, 50, 8), rtol=1e-3, atol=1e-4, **options)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_residual_vq_trains_as_that_of_the_source(name):
    arguments, options = GROUPED[name]
    modules = pair("GroupedResidualVQ", {"groups": 2, **arguments})
    compare(*modules, inputs(2, 50, 8), rtol=1e-3, atol=1e-4, **options)


@pytest.mark.parametrize("arguments", [{}, LEARNABLE, {"codebook_dim": 4}], ids=["ema", "learnable", "projected"])
def test_residual_vq_of_an_input_without_gradient_trains_as_that_of_the_source(arguments):
    compare(*pair("ResidualVQ", arguments), inputs(2, 50, 8), rtol=1e-3, atol=1e-4, requires_grad=False)


@pytest.mark.parametrize("levels", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["ResidualVQ", "GroupedResidualVQ"])
def test_residual_vq_gradient_is_that_of_each_level(name, levels):
    layer = pair(name, {"num_quantizers": levels, "rotation_trick": False, "commitment_weight": 0.0})[1]
    x = inputs(2, 50, 8)[0].requires_grad_()
    layer(x)[0].sum().backward()
    assert_close(x.grad, torch.full_like(x, levels))


@pytest.mark.parametrize("arguments", [{}, {"shared_codebook": True}, {"codebook_dim": 4}], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_residual_vq_in_one_operation_equals_its_levels_one_by_one(arguments, mode):
    layer = pair("ResidualVQ", arguments)[1].train(mode == "train")
    by_level = copy.deepcopy(layer)
    by_level._is_fused = lambda temperature: False
    x = inputs(2, 50, 8)[0]
    results = []
    for module in (layer, by_level):
        vectors = x.clone().requires_grad_()
        quantized, indices, losses = module(vectors)
        (quantized.square().sum() + losses.sum()).backward() if mode == "train" else None
        results.append([quantized, indices, losses, vectors.grad, *module.state_dict().values()])
    for first, second in zip(*results, strict=True):
        assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_residual_vq_replaces_dead_codes_by_residuals_of_their_level(shared):
    layer = own.ResidualVQ(dim=4, num_quantizers=3, codebook_size=16, threshold_ema_dead_code=2, shared_codebook=shared)
    x = torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(0))
    for level in layer.layers:
        level.codebook = torch.cat([torch.full((1, 4), 0.25), torch.full((15, 4), 100.0)])
    _, indices, _ = layer(x)
    assert (indices == 0).all()
    residuals = [x[0] - 0.25 * level for level in range(3)]
    for level, module in enumerate(layer.layers):
        expected = torch.cat(residuals) if shared else residuals[level]
        distances = torch.cdist(module._codebook.embed[0, 1:].double(), expected.double()).min(1).values
        assert (distances < 1e-5).all()


def test_residual_vq_kmeans_initialises_each_level_with_its_residuals():
    layer = own.ResidualVQ(dim=4, num_quantizers=3, codebook_size=8, kmeans_init=True)
    x = torch.randn(1, 200, 4, generator=torch.Generator().manual_seed(0))
    assert not layer.eval()(x)[0].any()
    layer.train()(x)
    assert all(bool(level._codebook.initted) for level in layer.layers)
    quantized = [layer.eval().get_output_from_indices(layer(x)[1][..., :count]) for count in (1, 2, 3)]
    errors = [float((q - x).square().mean()) for q in quantized]
    assert 0.9 * errors[0] > errors[1]
    assert 0.9 * errors[1] > errors[2]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["defaults", "shared", "dropout", "learnable", "codebook_dim"])
def test_residual_vq_compiles_whole_and_exports(name, mode):
    layer = pair("ResidualVQ", CONFIGURATIONS[name][0])[1].train(mode == "train")
    eager, x = copy.deepcopy(layer), inputs(2, 50, 8)[0]
    torch._dynamo.reset()
    actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(x.clone().requires_grad_())
    if name != "dropout":
        expected = eager(x.clone().requires_grad_())
        for first, second in zip(actual, expected, strict=True):
            assert_close(first, second)
    torch.export.export(layer, (x,))


def test_residual_vq_compiled_dropout_updates_only_levels_that_ran():
    layer = pair("ResidualVQ", {"quantize_dropout": True})[1]
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), inputs(2, 50, 8)[0]
    counts = set()
    for _ in range(12):
        before = [level._codebook.cluster_size.clone() for level in layer.layers]
        _, indices, losses = compiled(x)
        ran = (indices >= 0).flatten(0, 1).all(0)
        counts.add(int(ran.sum()))
        assert torch.equal(losses != 0, ran)
        assert torch.equal((indices >= 0).flatten(0, 1).any(0), ran)
        changed = [not torch.equal(a, b._codebook.cluster_size) for a, b in zip(before, layer.layers, strict=True)]
        assert changed == ran.tolist()
    assert len(counts) > 1


def test_residual_vq_copies_and_pickles():
    layer, x = own.ResidualVQ(dim=8, num_quantizers=3, codebook_size=16, shared_codebook=True), inputs(2, 50, 8)[0]
    layer(x)
    layer.eval()
    for module in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(module(x)[0], layer(x)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": 2}, ValueError, "expected heads=1"),
        ({"num_quantizers": None}, ValueError, "expected num_quantizers"),
        ({"codebook_size": (16, 8)}, ValueError, "expected codebook_size of 4 levels"),
        ({"codebook_size": (16, 8, 4, 2), "shared_codebook": True}, ValueError, "expected one codebook_size"),
        ({"quantize_dropout_cutoff_index": 4}, ValueError, "quantize_dropout_cutoff_index"),
        ({"beam_size": 2}, TypeError, "ResidualVQ does not implement the argument 'beam_size'"),
        ({"affine_param": True}, TypeError, "VectorQuantize does not implement the argument 'affine_param'"),
        ({"colour": 1}, TypeError, "unknown argument 'colour'"),
    ],
)
def test_residual_vq_of_wrong_arguments_raises(arguments, error, message):
    with pytest.raises(error, match=message):
        own.ResidualVQ(**{"dim": 8, "codebook_size": 16, "num_quantizers": 4, **arguments})


def test_residual_vq_of_wrong_inputs_raises():
    layer = own.ResidualVQ(dim=8, codebook_size=16, num_quantizers=4)
    with pytest.raises(ValueError, match=r"expected x of shape \[b, ..., 8\]"):
        layer(torch.randn(2, 5, 7))
    with pytest.raises(ValueError, match=r"with n in \[1, 4\], got"):
        layer.get_output_from_indices(torch.zeros(2, 5, 5, dtype=torch.long))
    with pytest.raises(TypeError, match=r"ResidualVQ\.forward does not implement the argument 'beam_size'"):
        layer(torch.randn(2, 5, 8), beam_size=2)
    with pytest.raises(ValueError, match="expected dim to be a multiple of groups"):
        own.GroupedResidualVQ(dim=8, groups=3, codebook_size=16, num_quantizers=4)

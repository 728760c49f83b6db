"""VectorQuantize gives what that of vector-quantize-pytorch gives: results, gradients and state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from dlvae_kernels.compat.vector_quantize_pytorch import VectorQuantize

from .comparison import compare

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

SEPARATE = {"heads": 2, "separate_codebook_per_head": True}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
DIVERSE = {"codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 1.0}
FROZEN = {"freeze_codebook": True}
MASK = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.6
TARGETS = torch.randint(0, 16, (2, 50), generator=torch.Generator().manual_seed(0))

# Each configuration: arguments of the constructor, the shape of the input, arguments of forward.
SEQUENCE = (2, 50, 8)
CONFIGURATIONS = {
    "defaults": ({}, SEQUENCE, {}),
    "decay": ({"decay": 0.99}, SEQUENCE, {}),
    "eps": ({"eps": 1e-3}, SEQUENCE, {}),
    "cosine": ({"use_cosine_sim": True}, SEQUENCE, {}),
    "codebook_dim": ({"codebook_dim": 4}, SEQUENCE, {}),
    "layernorm": ({"codebook_dim": 4, "layernorm_after_project_in": True}, SEQUENCE, {}),
    "cosine_codebook_dim": ({"codebook_dim": 4, "use_cosine_sim": True}, SEQUENCE, {}),
    "heads": ({"heads": 2, "codebook_dim": 4}, SEQUENCE, {}),
    "heads_projected": ({"heads": 2}, SEQUENCE, {}),
    "separate": ({**SEPARATE, "codebook_dim": 4}, SEQUENCE, {}),
    "separate_projected": (SEPARATE, SEQUENCE, {}),
    "separate_cosine": ({**SEPARATE, "codebook_dim": 4, "use_cosine_sim": True}, SEQUENCE, {}),
    "learnable": (LEARNABLE, SEQUENCE, {}),
    "learnable_separate": ({**LEARNABLE, **SEPARATE}, SEQUENCE, {}),
    "learnable_frozen": (LEARNABLE, SEQUENCE, FROZEN),
    "orthogonal": ({"orthogonal_reg_weight": 1.0}, SEQUENCE, {}),
    "orthogonal_active": ({"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True}, SEQUENCE, {}),
    "orthogonal_max": ({"orthogonal_reg_weight": 1.0, "orthogonal_reg_max_codes": 5}, SEQUENCE, {}),
    "orthogonal_separate": ({"orthogonal_reg_weight": 1.0, **SEPARATE}, SEQUENCE, {}),
    "diversity": (DIVERSE, SEQUENCE, FROZEN),
    "diversity_heads": ({**DIVERSE, "heads": 2}, SEQUENCE, FROZEN),
    "diversity_separate": ({**DIVERSE, **SEPARATE}, SEQUENCE, FROZEN),
    "frozen": ({"freeze_codebook": True}, SEQUENCE, {}),
    "no_commitment": ({"commitment_weight": 0.0}, SEQUENCE, {}),
    "commitment": ({"commitment_weight": 0.25}, SEQUENCE, {}),
    "no_ema": ({"ema_update": False}, SEQUENCE, {}),
    "manual_ema": ({"manual_ema_update": True}, SEQUENCE, {}),
    "not_routed": ({"route_gradients_to_input": False}, SEQUENCE, {}),
    "image": ({"accept_image_fmap": True}, (2, 8, 5, 4), {}),
    "image_projected": ({"accept_image_fmap": True, "codebook_dim": 4}, (2, 8, 5, 4), {}),
    "image_heads": ({"accept_image_fmap": True, **SEPARATE}, (2, 8, 5, 4), {}),
    "volume": ({"accept_3d_fmap": True}, (2, 8, 3, 5, 4), {}),
    "channel_first": ({"channel_last": False}, (2, 8, 30), {}),
    "one_token": ({}, (20, 8), {}),
    "one_feature": ({"dim": 1}, (2, 50, 1), {}),
    "mask": ({}, SEQUENCE, {"mask": MASK}),
    "mask_kept": ({"return_zeros_for_masked_padding": False}, SEQUENCE, {"mask": MASK}),
    "lens": ({}, SEQUENCE, {"lens": torch.tensor([20, 50])}),
    "breakdown": ({"orthogonal_reg_weight": 1.0}, SEQUENCE, {"return_loss_breakdown": True}),
    "targets": ({}, SEQUENCE, {"indices": TARGETS, **FROZEN}),
    "targets_cosine": ({"use_cosine_sim": True}, SEQUENCE, {"indices": TARGETS, **FROZEN}),
    "ema_weight": ({}, SEQUENCE, {"ema_update_weight": torch.linspace(0, 1, 16)}),
    "ema_weight_function": ({}, SEQUENCE, {"ema_update_weight": lambda sums, counts: counts / counts.sum()}),
}


def inputs(shape, count=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def pair(arguments):
    arguments = {"dim": 8, "codebook_size": 16, **arguments}
    modules = []
    for cls in (stock.VectorQuantize, VectorQuantize):
        torch.manual_seed(0)
        modules.append(cls(**arguments))
    return modules


@pytest.mark.parametrize("rotation_trick", [True, False], ids=["rotation", "straight_through"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_vector_quantize_trains_as_that_of_the_source(name, rotation_trick):
    arguments, shape, options = CONFIGURATIONS[name]
    modules = pair({**arguments, "rotation_trick": rotation_trick})
    compare(*modules, inputs(shape), **options)


@pytest.mark.parametrize("arguments", [{}, LEARNABLE, {"codebook_dim": 4}], ids=["ema", "learnable", "projected"])
def test_vector_quantize_of_an_input_without_gradient_trains_as_that_of_the_source(arguments):
    compare(*pair(arguments), inputs(SEQUENCE), requires_grad=False)


@pytest.mark.parametrize("name", ["defaults", "cosine", "codebook_dim", "separate", "orthogonal", "learnable"])
def test_vector_quantize_of_a_seed_starts_from_the_state_of_the_source(name):
    first, second = pair(CONFIGURATIONS[name][0])
    expected, actual = first.state_dict(), second.state_dict()
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert_close(actual[key], value)


def test_vector_quantize_accumulates_statistics_for_the_next_step():
    first, second = pair({})
    second.load_state_dict(first.state_dict())
    for step, x in enumerate(inputs(SEQUENCE, 3)):
        for module in (first, second):
            module(x, accum_ema_update=step < 2)
    for key, value in first.state_dict().items():
        assert_close(second.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, SEPARATE, {"use_cosine_sim": True}], ids=["one", "separate", "cosine"])
def test_vector_quantize_kmeans_of_separated_clusters_gives_the_state_of_the_source(arguments):
    first, second = pair({**arguments, "kmeans_init": True, "codebook_size": 3})
    generator = torch.Generator().manual_seed(2)
    centers = torch.randn(3, 8, generator=generator) * 100
    x = centers[torch.arange(90) % 3] + torch.randn(90, 8, generator=generator) * 0.01
    for seed in range(20):
        # The first vectors must come from three clusters, for both to find them.
        candidates = [copy.deepcopy(module) for module in (first, second)]
        torch.manual_seed(seed)
        if arguments.get("heads"):
            candidates[1].load_state_dict(candidates[0].state_dict())
        for module in candidates:
            module(x[None])
        states = [module.state_dict() for module in candidates]
        orders = [state["_codebook.embed"][0, :, 0].argsort() for state in states]
        sizes = [state["_codebook.cluster_size"][0][order] for state, order in zip(states, orders, strict=True)]
        if (sizes[0] == 30).all() and (sizes[1] == 30).all():
            codes = [state["_codebook.embed"][0][order] for state, order in zip(states, orders, strict=True)]
            assert_close(codes[1], codes[0], rtol=1e-4, atol=1e-4)
            assert bool(second._codebook.initted) is False
            assert bool(states[1]["_codebook.initted"])
            return
    pytest.fail("no seed found all clusters")


def test_vector_quantize_samples_codes_by_the_softmax_of_their_distances():
    layer = VectorQuantize(2, 5, stochastic_sample_codes=True, sample_codebook_temp=0.7)
    codes = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    layer.codebook = codes
    x = torch.tensor([0.3, -0.2]).expand(1, 20_000, 2)
    torch.manual_seed(0)
    _, indices, _ = layer(x, freeze_codebook=True)
    distances = (codes.double() - x[0, 0].double()).norm(dim=-1)
    expected = (-distances / 0.7).softmax(0)
    frequency = indices.flatten().bincount(minlength=5) / 20_000
    assert_close(frequency.double(), expected, rtol=0, atol=0.012)
    assert (layer.eval()(x)[1] == distances.argmin()).all()
    layer.train()
    assert (layer(x, sample_codebook_temp=0.0, freeze_codebook=True)[1] == distances.argmin()).all()


def test_vector_quantize_replaces_dead_codes_by_vectors_of_the_batch():
    layer = VectorQuantize(4, 16, threshold_ema_dead_code=2)
    layer.codebook = torch.cat([torch.zeros(1, 4), torch.full((15, 4), 100.0)])
    x = torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(0))
    layer(x)
    codebook = layer._codebook
    is_vector = (codebook.embed[0, :, None] == x[0]).all(-1).any(-1)
    assert is_vector[1:].all()
    assert torch.equal(codebook.cluster_size[0, 1:], torch.full((15,), 2.0))
    assert_close(codebook.embed_avg[0, 1:], 2 * codebook.embed[0, 1:])
    # Two vectors replace two codes only.
    layer = VectorQuantize(4, 16, threshold_ema_dead_code=2)
    layer.codebook = torch.full((16, 4), 100.0)
    layer(x[:, :2])
    assert (layer._codebook.embed[0] != 100).any(-1).sum() <= 3


def test_vector_quantize_sees_writes_into_its_state():
    layer = VectorQuantize(4, 16).eval()
    layer._codebook.embed[:, 3] = torch.tensor([9.0, 9.0, 9.0, 9.0])
    _, indices, _ = layer(torch.full((1, 1, 4), 8.0))
    assert int(indices) == 3
    layer = VectorQuantize(4, 4).train()
    layer._codebook.initted.data.copy_(torch.tensor(False))
    x = torch.randn(1, 50, 4) + 50
    layer(x, freeze_codebook=True)
    assert (layer._codebook.embed > 40).all()
    assert bool(layer._codebook.initted)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["defaults", "cosine_codebook_dim", "separate", "learnable", "orthogonal_active"])
def test_vector_quantize_compiles_whole_and_exports(name, mode):
    arguments, shape, _ = CONFIGURATIONS[name]
    layer = VectorQuantize(**{"dim": 8, "codebook_size": 16, **arguments}).train(mode == "train")
    eager, (x, *_) = copy.deepcopy(layer), inputs(shape)
    torch._dynamo.reset()
    outputs = [module(x.clone().requires_grad_()) for module in (eager, torch.compile(layer, backend="aot_eager"))]
    for expected, actual in zip(*outputs, strict=True):
        assert_close(actual, expected)
    torch.export.export(layer, (x,))


def test_vector_quantize_copies_and_pickles():
    layer, (x, *_) = VectorQuantize(8, 16, codebook_dim=4, threshold_ema_dead_code=2), inputs(SEQUENCE)
    layer(x)
    layer.eval()
    for module in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(module(x)[0], layer(x)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learnable_codebook": True}, "expected ema_update=False with learnable_codebook=True"),
        ({"use_cosine_sim": True, **LEARNABLE}, "expected learnable_codebook=False with use_cosine_sim=True"),
        ({"codebook_size": 0}, "codebook_size"),
        ({"decay": 1.5}, "decay"),
        ({"commitment_weight": -1.0}, "commitment_weight"),
        ({"heads": 0}, "heads"),
    ],
)
def test_vector_quantize_of_wrong_arguments_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantize(**{"dim": 8, "codebook_size": 16, **arguments})


def test_vector_quantize_of_refused_arguments_raises_the_name():
    with pytest.raises(TypeError, match="VectorQuantize does not implement the argument 'affine_param'"):
        VectorQuantize(8, 16, affine_param=True)
    VectorQuantize(8, 16, affine_param=False)
    with pytest.raises(TypeError, match="unknown argument 'colour'"):
        VectorQuantize(8, 16, colour=1)
    with pytest.raises(TypeError, match=r"VectorQuantize\.forward does not implement the argument 'topk'"):
        VectorQuantize(8, 16)(torch.randn(1, 2, 8), topk=2)


def test_vector_quantize_of_wrong_inputs_raises_and_changes_nothing():
    layer = VectorQuantize(8, 16)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 5, 8)
    for call, message in (
        (lambda: layer(x[..., :7]), r"expected x of shape \[b, ..., 8\]"),
        (lambda: layer(x, mask=torch.ones(2, 4).bool()), r"expected mask of shape \(2, 5\)"),
        (lambda: layer(x, mask=torch.ones(2, 5).bool(), lens=torch.ones(2)), "expected mask or lens, got both"),
        (lambda: layer(x.long()), "expected x"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())

"""Steps of training that vector-quantize-pytorch 1.32 gets wrong, and that are mended here."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dlvae_kernels.compat import vector_quantize_pytorch as own

from ..allocations import Allocations
from ..layers.test_host_reads import HostReads
from .mends import Mends

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

mend = Mends()
SEPARATE = {"heads": 2, "separate_codebook_per_head": True}
RESIDUAL = {"codebook_size": 16, "num_quantizers": 3}
REVIVAL = {"threshold_ema_dead_code": 2}
VECTOR = {"name": "VectorQuantize", "codebook_size": 16}
# One layer of each kind.
KINDS = {
    "one": VECTOR,
    "separate": {**VECTOR, **SEPARATE},
    "cosine": {**VECTOR, "use_cosine_sim": True},
    "residual": {"name": "ResidualVQ", **RESIDUAL},
    "shared": {"name": "ResidualVQ", **RESIDUAL, "shared_codebook": True},
    "grouped": {"name": "GroupedResidualVQ", **RESIDUAL, "groups": 2},
}


def make(package, name="VectorQuantize", **arguments):
    torch.manual_seed(0)
    return getattr(package, name)(**{"dim": 8, **arguments})


def data(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state_of(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_equal_states(layer, expected):
    for name, value in layer.state_dict().items():
        assert torch.equal(value, expected[name]), name


# K-means


@mend(one=VECTOR, cosine=KINDS["cosine"], separate=KINDS["separate"], residual=KINDS["residual"])
def check_kmeans_leaves_no_code_of_zeros(package, **arguments):
    layer = make(package, **arguments, kmeans_init=True)
    points = data(8, 8)[torch.arange(64) % 8]
    layer(points[None])
    first = layer if arguments["name"] == "VectorQuantize" else layer.layers[0]
    assert first._codebook.embed.any(-1).all()


@mend(**{name: KINDS[name] for name in ("one", "cosine", "residual", "shared", "grouped")})
def check_kmeans_does_not_run_in_eval_mode(package, **arguments):
    layer = make(package, **arguments, kmeans_init=True).eval()
    before = state_of(layer)
    layer(data(1, 50, 8))
    assert_equal_states(layer, before)


# Precision


@mend(**{**KINDS, "separate": {**KINDS["separate"], "codebook_dim": 4}})
def check_statistics_of_half_precision_modules_are_those_of_float32(package, **arguments):
    layers = [make(package, **arguments, decay=0.99) for _ in range(2)]
    layers[1].to(torch.bfloat16)
    layers[0].load_state_dict(layers[1].state_dict())
    x = data(1, 50, 8).bfloat16()
    for _ in range(5):
        layers[0](x.float())
        layers[1](x)
    for (name, expected), actual in zip(layers[0].state_dict().items(), layers[1].state_dict().values(), strict=True):
        if "project" not in name:
            assert actual.dtype == expected.dtype
            assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@mend(**{name: KINDS[name] for name in ("one", "residual", "grouped")}, projected={**VECTOR, "codebook_dim": 4})
def check_autocast_of_the_cpu_changes_no_index(package, **arguments):
    layer, x = make(package, **{**arguments, "codebook_size": 256}), data(4, 500, 8)
    layer.eval()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0], expected[0])


@mend(**KINDS)
def check_nan_moves_no_code(package, **arguments):
    layer = make(package, **arguments, **REVIVAL)
    x = data(1, 50, 8)
    x[0, 3] = torch.nan
    layer(x)
    states = list(layer.state_dict().values())
    assert all(value.isfinite().all() for value in states)


@mend(one=VECTOR, residual=KINDS["residual"], shared=KINDS["shared"])
def check_vectors_of_nan_alone_change_no_code(package, **arguments):
    layer = make(package, **arguments)
    before = state_of(layer)
    layer(torch.full((1, 5, 8), torch.nan))
    for name, value in layer.state_dict().items():
        if name.endswith(".embed"):
            assert torch.equal(value, before[name])


# State


@mend(
    **{
        f"{name}_{mode}": {**KINDS[name], "reentrant": mode == "reentrant"}
        for name in KINDS
        for mode in ("reentrant", "not")
    }
)
def check_checkpointing_updates_the_averages_once(package, reentrant, **arguments):
    layers = [make(package, **arguments, **REVIVAL) for _ in range(2)]
    for layer, is_checkpointed in zip(layers, (False, True), strict=True):
        x = data(1, 50, 8).requires_grad_()
        torch.manual_seed(3)
        quantized, _, loss = checkpoint(layer, x, use_reentrant=reentrant) if is_checkpointed else layer(x)
        (quantized.square().sum() + loss.sum()).backward()
    assert_equal_states(layers[1], layers[0].state_dict())


@mend(
    **KINDS,
    kmeans={**VECTOR, "kmeans_init": True},
    revival={**VECTOR, **REVIVAL},
    residual_kmeans={**KINDS["residual"], "kmeans_init": True},
    residual_revival={**KINDS["residual"], **REVIVAL},
    shared_revival={**KINDS["shared"], **REVIVAL},
    grouped_revival={**KINDS["grouped"], **REVIVAL},
)
def check_training_step_reads_nothing_on_the_host(package, **arguments):
    layer, x = make(package, **arguments), data(1, 50, 8).requires_grad_()
    layer(x)
    # On the CPU the flag itself may be looked at.
    flags = {value.data_ptr() for name, value in layer.named_buffers() if name.endswith("initted")}
    with HostReads(ignored=flags) as reads:
        quantized, _, loss = layer(x)
        (quantized.sum() + loss.sum()).backward()
    assert reads.found == []


@mend(**KINDS, revival={**KINDS["residual"], **REVIVAL})
def check_training_step_makes_no_matrix_of_vectors_by_codes(package, **arguments):
    layer, x = make(package, **{**arguments, "codebook_size": 400}), data(1, 1000, 8).requires_grad_()
    with Allocations() as allocations:
        quantized, _, loss = layer(x)
        (quantized.sum() + loss.sum()).backward()
    assert allocations.elements < 1000 * 400 / 2, allocations.operation


@mend(one=VECTOR, separate=KINDS["separate"])
def check_loss_without_commitment_is_no_buffer(package, **arguments):
    layer = make(package, **arguments, commitment_weight=0.0)
    for _ in range(2):
        quantized, _, loss = layer(data(1, 50, 8).requires_grad_())
        (quantized.sum() + loss).backward()
    assert all(value.grad is None and not value.requires_grad for value in layer.buffers())


@mend(**{name: KINDS[name] for name in ("residual", "shared")}, cosine={**KINDS["residual"], "use_cosine_sim": True})
def check_residual_constructed_frozen_stays_so(package, **arguments):
    layer = make(package, **arguments, freeze_codebook=True)
    for level in layer.layers:
        level._codebook.embed.mul_(2)
    before = state_of(layer)
    layer(data(1, 50, 8))
    assert_equal_states(layer, before)


@mend(
    one=VECTOR,
    separate={**KINDS["separate"], "codebook_dim": 4},
    orthogonal={**VECTOR, "orthogonal_reg_weight": 1.0},
    residual=KINDS["residual"],
    shared=KINDS["shared"],
    shared_by_level={**KINDS["shared"], "quant_grad_frac": 0.1},
)
def check_codes_without_vectors_stay(package, **arguments):
    layer = make(package, **arguments)
    codebooks = [module for module in layer.modules() if hasattr(module, "embed_avg")]
    for codebook in codebooks:
        codebook.embed.data[:, 5] = codebook.embed_avg[:, 5] = 50.0
    # The first step has a vector at these codes, and later their counts underflow.
    x = data(1, 20, 8)
    x[0, 0] = 50.0
    layer(x)
    for step in range(600):
        layer(data(1, 20, 8, seed=step))
    for codebook in codebooks:
        assert_close(codebook.embed[:, 5].detach(), torch.full_like(codebook.embed[:, 5], 50.0), rtol=1e-4, atol=0)


# Gradients of losses on similarities


def similarities(x, codes):
    """Distances below 0 in float64, [..., K]."""
    return -(x[..., None, :] - codes).square().sum(-1).clamp(min=1e-8).sqrt()


@mend()
def check_gradient_of_the_cross_entropy_is_that_of_the_codes_before_the_step(package):
    layer, x = make(package, **VECTOR, decay=0.1), data(1, 50, 8).requires_grad_()
    codes, targets = layer.codebook.double(), torch.arange(50)[None] % 16
    gradient = torch.autograd.grad(layer(x, indices=targets)[1], x)[0]
    logits = similarities(x.double(), codes)
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits[0], targets[0]), x)[0]
    assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


@mend()
def check_gradient_of_the_diversity_is_that_of_the_codes_before_the_step(package):
    options = {"codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 1.0, "commitment_weight": 0.0}
    layer, x = make(package, **VECTOR, **options, decay=0.1), data(3, 50, 8).requires_grad_()
    codes = layer.codebook.double()
    gradient = torch.autograd.grad(layer(x)[2], x)[0]
    mean = similarities(x.double(), codes).softmax(-1).mean(0)
    expected = torch.autograd.grad((mean * mean.log()).sum(-1).mean(), x)[0]
    assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


# Graphs


@mend(
    torch._dynamo.exc.Unsupported,
    **{f"{name}_{mode}": {**KINDS[name], "mode": mode} for name in ("one", "residual") for mode in ("train", "eval")},
)
def check_layer_compiles_whole(package, mode, **arguments):
    layer = make(package, **arguments).train(mode == "train")
    eager, x = copy.deepcopy(layer), data(1, 50, 8)
    torch._dynamo.reset()
    actual = torch.compile(layer, fullgraph=True, backend="eager")(x)
    for value, expected in zip(actual, eager(x), strict=True):
        assert_close(value, expected)
    assert_equal_states(layer, eager.state_dict())


@mend(
    Exception,
    **{f"{name}_{mode}": {**KINDS[name], "mode": mode} for name in ("one", "residual") for mode in ("train", "eval")},
)
def check_layer_exports(package, mode, **arguments):
    layer, x = make(package, **arguments).train(mode == "train"), data(1, 50, 8)
    program = torch.export.export(copy.deepcopy(layer), (x,))
    for value, expected in zip(program.module()(x), layer(x), strict=True):
        assert_close(value, expected)


@pytest.mark.parametrize("mended", mend.found)
def test_mend_holds_here(mended):
    mended(own)


@pytest.mark.parametrize("mended", mend.found)
def test_mend_is_missing_in_the_source(mended):
    with pytest.raises(mended.error):
        mended(stock)

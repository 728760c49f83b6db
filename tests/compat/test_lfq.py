"""LFQ of the compatibility package against vector-quantize-pytorch 1.32, float64 formulas, and what is mended."""

from __future__ import annotations

import copy
import doctest
import pickle
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own
from dlvae_kernels.compat.vector_quantize_pytorch import lookup_free_quantization, residual_lfq

from .comparison import check_only_own, compare

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

ALL_TERMS = {"return_loss_breakdown": True}
# Arguments, shape of x, arguments of forward. With few codes and these temperatures no probability that
# vector-quantize-pytorch clamps at 1e-5 matters.
CASES = {
    "defaults": ({"codebook_size": 16}, (2, 10, 4), {"inv_temperature": 1.0}),
    "dim_alone": ({"dim": 5}, (2, 10, 5), {"inv_temperature": 0.5}),
    "image": ({"codebook_size": 16, "commitment_loss_weight": 0.3}, (2, 4, 5, 6), {"inv_temperature": 1.0}),
    "video": ({"codebook_size": 16, "diversity_gamma": 2.5}, (2, 4, 3, 2, 2), {"inv_temperature": 1.0}),
    "channel_first": ({"codebook_size": 16, "channel_first": True}, (2, 4, 9), {"inv_temperature": 1.0}),
    "projections": ({"codebook_size": 16, "dim": 6}, (2, 10, 6), {"inv_temperature": 1.0}),
    "projections_without_bias": (
        {"codebook_size": 16, "dim": 6, "projection_has_bias": False, "entropy_loss_weight": 0.7},
        (2, 6, 4, 3),
        {"inv_temperature": 1.0},
    ),
    "projections_of_equal_size": ({"codebook_size": 16, "has_projections": True}, (2, 10, 4), {"inv_temperature": 1.0}),
    "codebooks": ({"codebook_size": 8, "dim": 7, "num_codebooks": 3}, (2, 10, 7), {"inv_temperature": 1.0}),
    "codebooks_of_dim": ({"dim": 3, "num_codebooks": 2}, (2, 3, 4, 4), {"inv_temperature": 1.0}),
    "keep_num_codebooks_dim": (
        {"codebook_size": 16, "keep_num_codebooks_dim": True},
        (2, 10, 4),
        {"inv_temperature": 1.0},
    ),
    "scale": ({"codebook_size": 16, "codebook_scale": 0.3}, (2, 10, 4), {"inv_temperature": 3.0}),
    "spherical": (
        {"codebook_size": 16, "spherical": True, "codebook_scale": 1.5, "commitment_loss_weight": 0.5},
        (2, 10, 4),
        {"inv_temperature": 0.5},
    ),
    "rotation": (
        {"codebook_size": 8, "dim": 6, "num_codebooks": 2, "orthogonal_rotation": True},
        (2, 10, 6),
        {"inv_temperature": 1.0},
    ),
    "soft_clamp": ({"codebook_size": 16, "soft_clamp_input_value": 1.2}, (2, 10, 4), {"inv_temperature": 1.0}),
    "cosine": (
        {"codebook_size": 16, "dim": 6, "cosine_sim_project_in": True, "codebook_scale": 0.5},
        (2, 10, 6),
        {"inv_temperature": 1.0},
    ),
    "cosine_with_scale": (
        {"codebook_size": 16, "dim": 6, "cosine_sim_project_in": True, "cosine_sim_project_in_scale": 0.4},
        (2, 10, 6),
        {"inv_temperature": 1.0},
    ),
    "activation": (
        {"codebook_size": 16, "straight_through_activation": nn.Tanh()},
        (2, 10, 4),
        {"inv_temperature": 1.0},
    ),
    "softplus": (
        {"codebook_size": 16, "experimental_softplus_entropy_loss": True, "entropy_loss_offset": 1.5},
        (2, 10, 4),
        {"inv_temperature": 1.0},
    ),
    "fraction": ({"codebook_size": 16, "frac_per_sample_entropy": 0.35}, (2, 10, 4), {"inv_temperature": 1.0}),
    "in_the_dtype_of_x": ({"codebook_size": 16, "force_quantization_f32": False}, (2, 10, 4), {"inv_temperature": 1.0}),
    "mask_of_the_batch": (
        {"codebook_size": 16, "commitment_loss_weight": 0.3},
        (3, 10, 4),
        {"inv_temperature": 1.0, "mask": torch.tensor([True, False, True])},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_lfq_equals_vector_quantize_pytorch(name):
    arguments, shape, options = CASES[name]
    inputs = [0.5 * torch.randn(shape) for _ in range(2)]
    compare(stock.LFQ(**arguments), own.LFQ(**arguments), inputs, **ALL_TERMS, **options)


def test_lfq_at_the_default_temperature_equals_vector_quantize_pytorch_to_the_mass_of_clamped_probabilities():
    # An entropy of 2^6 codes differs by up to 4e-5, and its gradient by 2e-4 of the largest.
    inputs = [0.5 * torch.randn(2, 50, 6) for _ in range(2)]
    compare(stock.LFQ(dim=6), own.LFQ(dim=6), inputs, rtol=1e-3, atol=2e-3, **ALL_TERMS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_lfq_indices_decode_to_the_output(name, training):
    arguments, shape, options = CASES[name]
    module = own.LFQ(**arguments).train(training)
    # In float32, x + (c - x) is not c for large x.
    quantized, indices, _ = module(30 * torch.randn(shape), **options)
    assert torch.equal(module.indices_to_codes(indices), quantized)
    unprojected = module.indices_to_codes(indices, project_out=False)
    width = module.codebook_dim * module.num_codebooks
    assert unprojected.shape[1 if module.has_channels_first(len(shape)) else -1] == width


@pytest.mark.parametrize("spatial", [(), (7,), (3, 4)])
@pytest.mark.parametrize("channel_first", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_lfq_decodes_in_every_layout(spatial, channel_first, keep):
    module = own.LFQ(codebook_size=16, dim=6, channel_first=channel_first, keep_num_codebooks_dim=keep)
    x = torch.randn(2, 6, *spatial) if channel_first else torch.randn(2, *spatial, 6)
    quantized, indices, _ = module(x)
    assert quantized.shape == x.shape
    assert indices.shape == (2, *spatial, *([1] if keep else []))
    assert_close(module.indices_to_codes(indices), quantized)
    # The result of a layout is that of the vectors one by one.
    rows = x.movedim(1, -1) if channel_first else x
    assert torch.equal(
        module.eval()(rows.reshape(-1, 1, 6).movedim(-1, 1 if channel_first else -1))[1].flatten(), indices.flatten()
    )


def test_lfq_channels_last_map_and_vectors_without_positions_are_accepted():
    def check(package: ModuleType) -> None:
        for shape in ((2, 3, 5, 4), (6, 4)):
            module = package.LFQ(codebook_size=16, channel_first=False)
            x = torch.randn(shape)
            assert torch.equal(module(x)[0], torch.where(x > 0, 1.0, -1.0))

    check_only_own(check, own, stock)


def test_lfq_index_of_no_code_decodes_to_zeros():
    def check(package: ModuleType) -> None:
        module = package.LFQ(codebook_size=16, dim=6)
        codes = module.indices_to_codes(torch.tensor([[3, -1, 5]]))
        assert not codes[0, 1].any()
        assert_close(codes[0, ::2], module.indices_to_codes(torch.tensor([[3, 5]]))[0])
        assert not module.indices_to_codes(torch.tensor([[-1]]), project_out=False).any()

    check_only_own(check, own, stock)


@pytest.mark.parametrize(
    "arguments",
    [{"dim": 16}, {"dim": 16, "cosine_sim_project_in": True}, {"dim": 10, "orthogonal_rotation": True}],
    ids=["projections", "cosine", "rotation"],
)
def test_lfq_autocast_changes_no_index(arguments):
    x = torch.randn(1, 4000, arguments["dim"])

    def check(package: ModuleType) -> None:
        torch.manual_seed(2)
        module = package.LFQ(codebook_size=1024, **arguments)
        expected = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = module(x)
            decoded = module.indices_to_codes(found.indices)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.quantized, expected.quantized)
        assert torch.equal(decoded, expected.quantized)
        assert_close(found.entropy_aux_loss, expected.entropy_aux_loss)

    check_only_own(check, own, stock)


def test_lfq_spherical_vector_of_zeros_has_a_finite_gradient():
    def check(package: ModuleType) -> None:
        x = torch.zeros(1, 3, 4, requires_grad=True)
        package.LFQ(dim=4, spherical=True)(x).quantized.sum().backward()
        assert float(x.grad.abs().max()) < 1e3

    check_only_own(check, own, stock)


def test_lfq_attributes_and_methods_of_vector_quantize_pytorch_exist():
    arguments = {"codebook_size": 16, "dim": 6, "orthogonal_rotation": True, "spherical": True}
    like, module = stock.LFQ(**arguments), own.LFQ(**arguments)
    for name, value in vars(like).items():
        if not name.startswith("_"):
            assert getattr(module, name) == value or name == "maybe_l2norm", name
    for name in [*like._buffers, *like._modules]:
        assert hasattr(module, name), name
    assert module.dtype == like.dtype == torch.float32
    assert module.mask.tolist() == [8, 4, 2, 1]
    assert module.bits_to_codes(torch.tensor([0.0, 1.0])).tolist() == [-1, 1]
    module.entropy_loss_weight, module.commitment_loss_weight = 0.0, 2.0
    loss, terms = module(torch.randn(2, 3, 6))[2], module(torch.randn(2, 3, 6), **ALL_TERMS)[1]
    assert float(loss.detach()) > 0
    assert float(terms.per_sample_entropy.detach()) > 0


def test_lfq_eval_has_losses_of_zero_and_no_gradient():
    module, x = own.LFQ(dim=4, commitment_loss_weight=1.0).eval(), torch.randn(2, 3, 4, requires_grad=True)
    (quantized, _, loss), terms = module(x, **ALL_TERMS)
    assert not quantized.requires_grad
    assert [float(each) for each in (loss, *terms)] == [0] * 4
    assert not any(each is module.zero for each in (loss, *terms))


@pytest.mark.parametrize("force", [True, False])
def test_lfq_bfloat16_matches_vector_quantize_pytorch(force):
    arguments = {"codebook_size": 32, "dim": 8, "force_quantization_f32": force}
    like, module = stock.LFQ(**arguments), own.LFQ(**arguments)
    module.load_state_dict(like.state_dict())
    like.bfloat16(), module.bfloat16()
    x = torch.randn(2, 50, 8).bfloat16()
    for training in (True, False):
        expected, found = (each.train(training)(x, 1.0, True) for each in (like, module))
        for actual, value in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
            assert actual.dtype == value.dtype
        assert torch.equal(module.indices_to_codes(found[0].indices), found[0].quantized)
        # Rounding x to bfloat16 moves few signs.
        assert (found[0].indices == expected[0].indices).float().mean() > 0.95
        assert_close(found[0].entropy_aux_loss, expected[0].entropy_aux_loss, rtol=0.05, atol=0.02)
    assert module.codebook.dtype == module.dtype == torch.bfloat16


def test_lfq_cosine_projection_matches_float64():
    module = lookup_free_quantization.CosineSimLinear(6, 3, scale=2.5)
    x = torch.randn(4, 6)
    expected = 2.5 * normalize(x.double(), dim=-1) @ normalize(module.weight.double(), dim=0)
    assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_lfq_compiled_whole_and_exported_match_eager(training):
    module = own.LFQ(codebook_size=16, dim=6, num_codebooks=2, spherical=True).train(training)
    mask = torch.rand(2, 5) < 0.7
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(module, (torch.randn(2, 5, 6), 1.0, False, mask)).module()
    x = torch.randn(2, 5, 6, requires_grad=True)
    results = []
    for function in (module, compiled, exported):
        quantized, indices, loss = function(x, 1.0, False, mask)
        grads = torch.autograd.grad(loss + quantized.square().sum(), x)[0] if training else x
        results.append((quantized, indices, loss, grads))
    for other in results[1:]:
        assert_close(other, results[0])


def test_lfq_export_in_train_mode_while_ranks_all_reduce_raises(monkeypatch):
    monkeypatch.setattr("dlvae_kernels.layers.distributed.num_ranks", lambda sync: 2 if sync else 1)
    with pytest.raises(ValueError, match="LFQ cannot be exported in train mode while ranks all-reduce"):
        torch.export.export(own.LFQ(dim=4), (torch.randn(2, 3, 4),), strict=False)
    torch.export.export(own.LFQ(dim=4).eval(), (torch.randn(2, 3, 4),), strict=False)


def test_lfq_is_copied_and_pickled():
    x = torch.randn(2, 5, 6)

    def check(package: ModuleType) -> None:
        module = package.LFQ(codebook_size=16, dim=6, spherical=True)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_close(other(x), module(x))

    check_only_own(check, own, stock)


def test_lfq_empty_batch_gives_empty_outputs():
    quantized, indices, loss = own.LFQ(codebook_size=16, dim=6)(torch.empty(0, 6, 3, 3))
    assert (quantized.shape, indices.shape, float(loss.detach())) == ((0, 6, 3, 3), (0, 3, 3), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"expected codebook_size or dim, got neither"),
        ({"codebook_size": 24}, r"expected codebook_size to be a power of 2, got 24; pass 32"),
        ({"codebook_size": 1}, r"expected codebook_size to be an integer in \[2, .*\], got 1"),
        ({"dim": 64}, r"expected dim without codebook_size to be an integer in \[1, 63\], got 64"),
        ({"dim": 25}, r"expected at most 2\^24 codes with an entropy loss, got 2\^25; pass more num_codebooks or"),
        ({"dim": 4, "num_codebooks": 0}, r"expected num_codebooks to be an integer of at least 1, got 0"),
        ({"codebook_size": 16, "dim": 5, "has_projections": False}, r"expected dim to be the 4 bits .*, got 5"),
        (
            {"dim": 4, "num_codebooks": 2, "keep_num_codebooks_dim": False},
            r"expected keep_num_codebooks_dim with 2 codebooks, got False",
        ),
        ({"dim": 4, "frac_per_sample_entropy": 0.0}, r"expected frac_per_sample_entropy in \(0, 1\], got 0.0"),
        ({"dim": 4, "soft_clamp_input_value": 0.5}, r"expected soft_clamp_input_value .* codebook_scale=1.0, got 0.5"),
    ],
)
def test_lfq_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        own.LFQ(**arguments)


def test_lfq_unknown_argument_raises_type_error_that_names_it():
    with pytest.raises(TypeError, match="'levels'"):
        own.LFQ(dim=4, levels=[2, 3])
    with pytest.raises(TypeError, match="'temperature'"):
        own.LFQ(dim=4)(torch.zeros(2, 3, 4), temperature=1.0)


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(2, 3, 5), None, r"expected x of shape \[b, ..., 4\], got \(2, 3, 5\)"),
        (
            torch.zeros(2, 3, 5, 4),
            None,
            r"expected x of shape \[b, 4, ...\], got \(2, 3, 5, 4\); .* channel_first=False",
        ),
        (torch.zeros(2, 3, 4).int(), None, r"expected x of dtype float16, .*, got torch.int32"),
        (
            torch.zeros(2, 3, 4),
            torch.ones(3).bool(),
            r"expected mask of shape \(2, 3\) and dtype torch.bool, got \(3,\)",
        ),
        (torch.zeros(2, 3, 4), torch.ones(2, 3), r"expected mask of shape .* torch.bool, got .* torch.float32"),
    ],
)
def test_lfq_bad_inputs_raise(x, mask, message):
    with pytest.raises(ValueError, match=message):
        own.LFQ(codebook_size=16)(x, mask=mask)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(2, 3), r"expected indices of dtype torch.int64 or another integer, got torch.float32"),
        (torch.zeros(2, 3).long(), r"expected indices of shape \[..., 2\], got \(2, 3\)"),
    ],
)
def test_lfq_bad_indices_raise(indices, message):
    with pytest.raises(ValueError, match=message):
        own.LFQ(codebook_size=16, num_codebooks=2).indices_to_codes(indices)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((lookup_free_quantization, name) for name in ("LFQ", "Return", "LossBreakdown", "CosineSimLinear")),
        *((residual_lfq, name) for name in ("ResidualLFQ", "GroupedResidualLFQ")),
    ],
)
def test_lfq_docstring_example_runs_as_written(module, name):
    example = doctest.DocTestParser().get_doctest(
        getattr(module, name).__doc__, {"torch": torch, **vars(module)}, name, None, None
    )
    assert example.examples
    report: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=report.append).failed == 0, "".join(report)

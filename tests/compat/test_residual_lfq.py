"""ResidualLFQ and GroupedResidualLFQ of the compatibility package against vector-quantize-pytorch 1.32."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own

from .comparison import check_only_own, compare

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

SIZES = {"dim": 4, "codebook_size": 16, "num_quantizers": 4}
PROJECTED = {**SIZES, "dim": 7}
# Arguments, shape of x, arguments of forward. The entropies have no weight where vector-quantize-pytorch, at its only
# temperature of 100, clamps probabilities visibly.
RESIDUAL = {
    "defaults": (SIZES, (2, 10, 4), {}),
    "projections": (PROJECTED, (2, 10, 7), {"return_all_codes": True}),
    "commitment": ({**PROJECTED, "commitment_loss_weight": 0.5}, (2, 10, 7), {}),
    "soft_clamp": ({**PROJECTED, "soft_clamp_input_value": 1.5}, (2, 10, 7), {}),
    "dropout": ({**SIZES, "quantize_dropout": True}, (2, 10, 4), {"return_all_codes": True}),
    "dropout_with_a_seed": (
        {**PROJECTED, "quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
        (2, 10, 7),
        {"rand_quantize_dropout_fixed_seed": 5},
    ),
    "dropout_by_threes": (
        {**SIZES, "quantize_dropout": True, "quantize_dropout_multiple_of": 3, "num_quantizers": 5},
        (2, 10, 4),
        {"rand_quantize_dropout_fixed_seed": 1},
    ),
    "mask_of_the_batch": (
        {**SIZES, "commitment_loss_weight": 0.5},
        (3, 10, 4),
        {"mask": torch.tensor([True, False, True])},
    ),
    "arguments_of_lfq": (
        {**PROJECTED, "diversity_gamma": 2.0, "frac_per_sample_entropy": 0.5, "straight_through_activation": torch.sin},
        (2, 10, 7),
        {},
    ),
    "spherical": ({**SIZES, "spherical": True}, (2, 10, 4), {}),
    "rotation": ({**SIZES, "orthogonal_rotation": True}, (2, 10, 4), {}),
    "image": (SIZES, (2, 4, 3, 5), {}),
    "keep_num_codebooks_dim": ({**SIZES, "keep_num_codebooks_dim": True}, (2, 10, 4), {}),
}
GROUPED = {
    "defaults": ({**SIZES, "dim": 8, "groups": 2}, (2, 10, 8), {}),
    "one_group": (PROJECTED, (2, 10, 7), {"return_all_codes": True}),
    "projections": ({**SIZES, "dim": 15, "groups": 3, "commitment_loss_weight": 0.3}, (2, 10, 15), {}),
    "dropout": ({**SIZES, "dim": 8, "groups": 2, "quantize_dropout": True}, (2, 10, 8), {"return_all_codes": True}),
    "mask_of_the_batch": ({**SIZES, "dim": 8, "groups": 2}, (2, 10, 8), {"mask": torch.tensor([True, False])}),
    "image": ({**SIZES, "dim": 8, "groups": 2, "accept_image_fmap": True}, (2, 8, 3, 5), {"return_all_codes": True}),
}
CASES = [("ResidualLFQ", *case) for case in RESIDUAL.values()] + [
    ("GroupedResidualLFQ", *case) for case in GROUPED.values()
]
IDS = [f"residual-{name}" for name in RESIDUAL] + [f"grouped-{name}" for name in GROUPED]


@pytest.mark.parametrize(("name", "arguments", "shape", "options"), CASES, ids=IDS)
def test_residual_lfq_equals_vector_quantize_pytorch(name, arguments, shape, options):
    like, module = (getattr(package, name)(**arguments) for package in (stock, own))
    # The gradient of an entropy of 2^4 codes at the temperature 100 differs by 4e-4 of the largest.
    compare(like, module, [torch.randn(shape) for _ in range(2)], rtol=1e-3, atol=2e-3, **options)


@pytest.mark.parametrize(("name", "arguments", "shape", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("training", [True, False])
def test_residual_lfq_indices_decode_to_the_output(name, arguments, shape, options, training):
    module = getattr(own, name)(**arguments).train(training)
    x = torch.randn(shape)
    quantized, indices, losses, codes = module(x, **{**options, "return_all_codes": True})
    assert quantized.shape == x.shape
    assert losses.shape == indices.shape[:1] * (name != "ResidualLFQ") + indices.shape[-1:]
    assert torch.equal(module.get_output_from_indices(indices), quantized)
    assert all(map(torch.equal, module.get_codes_from_indices(indices), codes))


def test_residual_lfq_levels_by_hand():
    module = own.ResidualLFQ(dim=2, codebook_size=4, num_quantizers=3).eval()
    quantized, indices, _, codes = module(torch.tensor([[[0.8, -1.3]]]), return_all_codes=True)
    assert codes[:, 0, 0].tolist() == [[1, -1], [-0.5, -0.5], [0.25, 0.25]]
    assert quantized.tolist() == [[[0.75, -1.25]]]
    assert indices.tolist() == [[[0b10, 0b00, 0b11]]]


@pytest.mark.parametrize("num_quantizers", [1, 4])
def test_residual_lfq_gradient_is_that_of_each_level(num_quantizers):
    module = own.ResidualLFQ(dim=4, codebook_size=16, num_quantizers=num_quantizers)
    x, weights = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    quantized, *_ = module(x)
    assert_close(torch.autograd.grad((quantized * weights).sum(), x)[0], num_quantizers * weights)


@pytest.mark.parametrize("option", ["spherical", "orthogonal_rotation"])
def test_residual_lfq_decodes_codes_that_are_not_those_of_the_codebook(option):
    x = torch.randn(2, 5, 4)

    def check(package: ModuleType) -> None:
        module = package.ResidualLFQ(**SIZES, **{option: True}).eval()
        quantized, indices, _ = module(x)
        assert_close(module.get_output_from_indices(indices), quantized)

    check_only_own(check, own, stock)


def test_residual_lfq_decodes_fewer_levels_without_dropout():
    x = torch.randn(2, 5, 7)

    def check(package: ModuleType) -> None:
        torch.manual_seed(0)
        module = package.ResidualLFQ(**PROJECTED).eval()
        _, indices, _, codes = module(x, return_all_codes=True)
        found = module.get_codes_from_indices(indices[..., :2])
        assert_close(found[:2], codes[:2])
        assert found.shape == codes.shape
        assert not found[2:].any()
        assert_close(module.get_output_from_indices(indices[..., :2]), module.project_out(codes[:2].sum(0)))

    check_only_own(check, own, stock)


def test_residual_lfq_position_without_codes_decodes_to_zeros():
    def check(package: ModuleType) -> None:
        module = package.ResidualLFQ(**PROJECTED, quantize_dropout=True)
        decoded = module.get_output_from_indices(torch.tensor([[[1, -1, -1, -1], [-1, -1, -1, -1]]]))
        assert decoded[0, 0].any()
        assert not decoded[0, 1].any()

    check_only_own(check, own, stock)


@pytest.mark.parametrize("option", ["projections", "dropout", "decoding"])
def test_grouped_residual_lfq_image_works_with_every_option(option):
    arguments = {**SIZES, "dim": 15 if option == "projections" else 12, "groups": 3, "accept_image_fmap": True}
    x = torch.randn(2, arguments["dim"], 3, 5)

    def check(package: ModuleType) -> None:
        module = package.GroupedResidualLFQ(**arguments, quantize_dropout=option == "dropout")
        # Eight steps run fewer than all levels at least once.
        for _ in range(8 if option == "dropout" else 1):
            quantized, indices, losses = module(x)
            assert (quantized.shape, indices.shape, losses.shape) == (x.shape, (3, 2, 3, 5, 4), (3, 4))
            if option != "dropout":
                assert_close(module.get_output_from_indices(indices), quantized)

    check_only_own(check, own, stock)


@pytest.mark.parametrize("channel_first", [True, False])
def test_residual_lfq_map_is_its_vectors_in_both_layouts(channel_first):
    module = own.ResidualLFQ(**PROJECTED, channel_first=channel_first, commitment_loss_weight=0.4)
    x, mask = torch.randn(2, 3, 5, 7), torch.rand(2, 3, 5) < 0.7
    expected = module.train()(x[mask][None].movedim(-1, 1 if channel_first else -1))
    quantized, indices, losses = module(x.movedim(-1, 1) if channel_first else x, mask)
    assert_close(losses, expected[2])
    assert torch.equal(indices[mask], expected[1][0])
    rows = quantized.movedim(1, -1) if channel_first else quantized
    expected_rows = expected[0].movedim(1, -1) if channel_first else expected[0]
    assert_close(rows[mask], expected_rows[0])


@pytest.mark.parametrize(("accepts_maps", "shape"), [(True, (2, 14, 9)), (False, (2, 3, 5, 14)), (False, (6, 14))])
def test_grouped_residual_lfq_has_channels_where_accept_image_fmap_says(accepts_maps, shape):
    module = own.GroupedResidualLFQ(**{**PROJECTED, "dim": 14}, groups=2, accept_image_fmap=accepts_maps)
    x = torch.randn(shape)
    quantized, indices, _ = module(x)
    rows = x.movedim(1, -1) if accepts_maps else x
    vectors = rows[..., 7:].reshape(-1, 7)
    expected = module.rvqs[1](vectors)
    assert torch.equal(indices[1].flatten(), expected[1].flatten())
    assert_close((quantized.movedim(1, -1) if accepts_maps else quantized)[..., 7:].reshape(-1, 7), expected[0])
    assert torch.equal(module.get_output_from_indices(indices), quantized)


def test_residual_lfq_dropout_needs_train_mode_and_gradients():
    module, x = own.ResidualLFQ(**SIZES, quantize_dropout=True), torch.randn(2, 3, 4)
    seen = {int((module(x)[1][0, 0] >= 0).sum()) for _ in range(50)}
    assert seen == {1, 2, 3, 4}
    with torch.no_grad():
        assert all((module(x)[1] >= 0).all() for _ in range(10))
    assert all((module.eval()(x)[1] >= 0).all() for _ in range(10))


def test_residual_lfq_autocast_changes_no_index():
    x = torch.randn(1, 4000, 16)

    def check(package: ModuleType) -> None:
        torch.manual_seed(2)
        module = package.ResidualLFQ(dim=16, codebook_size=256, num_quantizers=2)
        expected = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = module(x)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])

    check_only_own(check, own, stock)


def test_residual_lfq_attributes_of_vector_quantize_pytorch_exist():
    for name, arguments in (("ResidualLFQ", PROJECTED), ("GroupedResidualLFQ", {**SIZES, "groups": 2, "dim": 8})):
        like, module = (getattr(package, name)(**arguments) for package in (stock, own))
        for key, value in vars(like).items():
            if not key.startswith("_"):
                assert getattr(module, key) == value, key
        assert torch.equal(module.codebooks, like.codebooks)
        assert {*like._modules} == {*module._modules}
    assert (module.split_dim, own.GroupedResidualLFQ(**SIZES, accept_image_fmap=True).split_dim) == (-1, 1)


def test_residual_lfq_compiled_whole_and_exported_match_eager():
    # GroupedResidualLFQ runs ResidualLFQ.
    module = own.GroupedResidualLFQ(**{**PROJECTED, "num_quantizers": 2}, commitment_loss_weight=0.3)
    for training in (True, False):
        module.train(training)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(module, (torch.randn(2, 5, 7),)).module()
        x = torch.randn(2, 5, 7, requires_grad=True)
        results = []
        for function in (module, compiled, exported):
            quantized, indices, losses = function(x)
            grads = torch.autograd.grad(losses.sum() + quantized.square().sum(), x)[0] if training else x
            results.append((quantized, indices, losses, grads))
        for other in results[1:]:
            assert_close(other, results[0])


@pytest.mark.parametrize("name", ["ResidualLFQ", "GroupedResidualLFQ"])
def test_residual_lfq_is_copied_and_pickled(name):
    module, x = getattr(own, name)(**PROJECTED, quantize_dropout=True, spherical=True).eval(), torch.randn(2, 5, 7)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_close(other(x), module(x))


@pytest.mark.parametrize("name", ["ResidualLFQ", "GroupedResidualLFQ"])
def test_residual_lfq_bfloat16_has_the_dtypes_of_vector_quantize_pytorch(name):
    like, module = (getattr(package, name)(**PROJECTED) for package in (stock, own))
    like.bfloat16(), module.bfloat16()
    x = torch.randn(2, 5, 7).bfloat16()
    for training in (True, False):
        expected, found = like.train(training)(x), module.train(training)(x)
        assert [each.dtype for each in found] == [each.dtype for each in expected]
        assert torch.equal(module.get_output_from_indices(found[1]), found[0])
    # Half precision beside float32 parameters is quantized in float32.
    module, x = getattr(own, name)(**SIZES), torch.randn(50, 4).bfloat16()
    assert torch.equal(module(x)[1], module(x.float())[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_quantizers": 0}, r"expected num_quantizers to be an integer of at least 1, got 0"),
        ({"codebook_size": 24}, r"expected codebook_size to be a power of 2, got 24; pass 32"),
        ({"num_codebooks": 2}, r"expected levels of one codebook without projections, got .* num_codebooks=2"),
        ({"has_projections": True}, r"expected levels of one codebook without projections, got has_projections=True"),
        ({"soft_clamp_input_value": 0.5}, r"expected soft_clamp_input_value .* codebook_scale=1, got 0.5"),
        (
            {"quantize_dropout": True, "quantize_dropout_cutoff_index": 4},
            r"expected quantize_dropout_cutoff_index in \[0, 4\)",
        ),
        ({"groups": 3}, r"expected dim to be a multiple of groups=3, got 4"),
    ],
)
def test_residual_lfq_bad_arguments_raise(arguments, message):
    kind = own.GroupedResidualLFQ if "groups" in arguments else own.ResidualLFQ
    with pytest.raises(ValueError, match=message):
        kind(**{**SIZES, **arguments})


@pytest.mark.parametrize("name", ["ResidualLFQ", "GroupedResidualLFQ"])
@pytest.mark.parametrize("argument", ["levels", "codebook_scale"])
def test_residual_lfq_unknown_argument_raises_type_error_that_names_it(name, argument):
    with pytest.raises(TypeError, match=f"'{argument}'"):
        getattr(own, name)(**SIZES, **{argument: 2.0})


def test_residual_lfq_bad_inputs_raise():
    module, grouped = own.ResidualLFQ(**SIZES), own.GroupedResidualLFQ(**{**SIZES, "dim": 8}, groups=2)
    with pytest.raises(ValueError, match=r"expected x of shape \[b, ..., 4\], got \(2, 3, 5\)"):
        module(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"expected mask of shape \(2, 3\) .*, got \(2, 4\)"):
        module(torch.zeros(2, 3, 4), torch.ones(2, 4).bool())
    with pytest.raises(
        ValueError, match=r"expected x of shape \[b, ..., 8\], got \(2, 8, 5\); .* pass accept_image_fmap=True"
    ):
        grouped(torch.zeros(2, 8, 5))
    with pytest.raises(
        ValueError, match=r"expected indices of shape \[b, ..., n\] with n in \[1, 4\], got \(2, 3, 5\)"
    ):
        module.get_codes_from_indices(torch.zeros(2, 3, 5).long())
    with pytest.raises(ValueError, match=r"expected indices of shape \[2, b, ..., n\], got \(3, 1, 2\)"):
        grouped.get_output_from_indices(torch.zeros(3, 1, 2).long())

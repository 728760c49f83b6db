"""ResidualFSQ and GroupedResidualFSQ against vector-quantize-pytorch and a float64 formula, and what is mended."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own

from .comparison import compare, copy_state

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

L = 4
LEVELS = [8, 5, 3]
RESIDUAL = {
    "defaults": ({}, (2, 20, 3), {}),
    "projections": ({"dim": 7}, (2, 20, 7), {}),
    "all_codes": ({"dim": 7}, (2, 20, 7), {"return_all_codes": True}),
    "levels_of_two": ({"levels": [2, 4]}, (2, 20, 2), {}),
    "one_quantizer": (
        {"num_quantizers": 1, "quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
        (2, 20, 3),
        {},
    ),
    "tanh": ({"bound_hard_clamp": False}, (2, 20, 3), {}),
    "soft_clamp": ({"bound_hard_clamp": False, "soft_clamp_input_value": 1.3}, (2, 20, 3), {}),
    "soft_clamps": ({"bound_hard_clamp": False, "soft_clamp_input_value": [1.3, 2.0, 0.7]}, (2, 20, 3), {}),
    "channel_first": ({"dim": 7, "is_channel_first": True}, (2, 7, 20), {}),
    "channel_first_images": ({"is_channel_first": True}, (2, 3, 4, 5), {}),
    "channel_first_vectors": ({"is_channel_first": True}, (20, 3), {}),
    "dropout": ({"quantize_dropout": True}, (2, 20, 3), {}),
    "dropout_with_a_seed": (
        {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
        (2, 20, 3),
        {"rand_quantize_dropout_fixed_seed": 5, "return_all_codes": True},
    ),
    "dropout_by_threes": (
        {"quantize_dropout": True, "quantize_dropout_multiple_of": 3, "dim": 7, "is_channel_first": True},
        (2, 7, 20),
        {"rand_quantize_dropout_fixed_seed": 3},
    ),
    "noise": ({"noise_dropout": 0.5}, (2, 20, 3), {}),
    "rotation": ({"levels": [5, 5, 5], "orthogonal_rotation": True}, (2, 20, 3), {}),
    "kept_dimension": ({"keep_num_codebooks_dim": True, "scale": 1.0, "projection_has_bias": False}, (2, 20, 3), {}),
}
GROUPED = {
    "defaults": ({}, (2, 20, 12), {}),
    "one_group": ({"groups": 1, "num_quantizers": 2}, (2, 20, 12), {}),
    "three_groups": ({"groups": 3, "levels": [5, 5, 5, 5]}, (2, 20, 12), {"return_all_codes": True}),
    "dropout": ({"quantize_dropout": True}, (2, 20, 12), {}),
    "dropout_by_twos": ({"quantize_dropout": True, "quantize_dropout_multiple_of": 2}, (2, 20, 12), {}),
    "images": ({"accept_image_fmap": True, "is_channel_first": True}, (2, 12, 4, 5), {}),
    "soft_clamp": ({"bound_hard_clamp": False, "soft_clamp_input_value": 2.0}, (2, 20, 12), {}),
}


class StockResidualFSQ(stock.ResidualFSQ):
    """The indices of vector-quantize-pytorch are int64 where a level is dropped, and int32 otherwise."""

    def forward(self, *args, **kwargs):
        quantized, indices, *codes = super().forward(*args, **kwargs)
        return quantized, indices.int(), *codes


class StockGroupedResidualFSQ(stock.GroupedResidualFSQ):
    """The indices of vector-quantize-pytorch are int64 where a level is dropped, and int32 otherwise."""

    def forward(self, *args, **kwargs):
        quantized, indices, *codes = super().forward(*args, **kwargs)
        return quantized, indices.int(), *codes


def residual(**options) -> tuple[nn.Module, own.ResidualFSQ]:
    """A module of vector-quantize-pytorch, and that of the compatibility package with its state."""
    options = {"levels": LEVELS, "num_quantizers": L, **options}
    like, module = StockResidualFSQ(**options), own.ResidualFSQ(**options)
    copy_state(like, module)
    return like, module


def grouped(**options) -> tuple[nn.Module, own.GroupedResidualFSQ]:
    options = {"dim": 12, "groups": 2, "levels": LEVELS, "num_quantizers": L, **options}
    like, module = StockGroupedResidualFSQ(**options), own.GroupedResidualFSQ(**options)
    copy_state(like, module)
    return like, module


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_fsq_trains_as_vector_quantize_pytorch(name):
    options, shape, arguments = RESIDUAL[name]
    compare(*residual(**options), [1.5 * torch.randn(shape) for _ in range(2)], **arguments)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_residual_fsq_trains_as_vector_quantize_pytorch(name):
    options, shape, arguments = GROUPED[name]
    compare(*grouped(**options), [1.5 * torch.randn(shape) for _ in range(2)], **arguments)


@pytest.mark.parametrize("make", [residual, grouped])
def test_residual_fsq_attributes_and_decoding_are_those_of_vector_quantize_pytorch(make):
    like, module = make(dim=12, quantize_dropout=True)
    for attribute, expected in vars(like).items():
        if not attribute.startswith("_") and attribute != "training":
            assert getattr(module, attribute) == expected, attribute
    assert torch.equal(module.codebooks, like.codebooks)
    for key, expected in like.named_buffers():
        if not key.endswith("implicit_codebook"):
            assert torch.equal(module.get_buffer(key), expected)
    shape = (2, 9, L) if make is residual else (2, 2, 9, L)
    indices = torch.randint(-1, 120, shape)
    indices[..., 0] = 7
    for each in (indices, indices[..., :2]):
        assert_close(module.get_codes_from_indices(each), like.get_codes_from_indices(each))
        assert_close(module.get_output_from_indices(each), like.get_output_from_indices(each))


def test_residual_fsq_round_trip_is_exact_as_in_the_tests_of_vector_quantize_pytorch():
    module = own.ResidualFSQ(dim=256, levels=[8, 5, 5, 3], num_quantizers=8).eval()
    quantized, indices = module(torch.randn(1, 1024, 256))
    assert torch.equal(quantized, module.get_output_from_indices(indices))


def test_residual_fsq_value_and_gradient_match_float64():
    size = torch.tensor(LEVELS).double()
    x = torch.randn(2, 200, 3, dtype=torch.float64, requires_grad=True)
    softest = 1 + 1 / (size - 1)
    tanh = (x.detach() / softest).tanh()
    left, total, slope, is_clear = tanh * softest, 0, 0, True
    for level in range(L):
        inside = left * size**level
        position = (size - 1) * (inside.clamp(-1, 1) + 1) / 2
        code = (position.add(0.5).floor() * 2 / (size - 1) - 1) * size**-level
        is_clear = is_clear & ((position.frac() - 0.5).abs() > 1e-5) & ((inside.abs() - 1).abs() > 1e-5)
        left, total, slope = left - code, total + code, slope + (inside.abs() <= 1)
    quantized, _ = own.ResidualFSQ(levels=LEVELS, num_quantizers=L)(x)
    (grad,) = torch.autograd.grad(quantized.sum(), x)
    assert is_clear.double().mean() > 0.99
    assert_close(quantized[is_clear].detach(), total[is_clear], rtol=0, atol=1e-6)
    assert_close(grad[is_clear], (slope * (1 - tanh**2))[is_clear], rtol=1e-5, atol=1e-6)
    assert 2 < float(grad.mean()) < L


# The rest tests what is mended, and errors.


def round_trips(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether the indices of a module decode to its output, in all ways."""
    try:
        quantized, indices, codes = module(x, return_all_codes=True)
        codes = torch.stack(codes) if isinstance(codes, tuple) else codes
        decoded = module.get_output_from_indices(indices)
        return bool(
            decoded.shape == quantized.shape == x.shape
            and torch.allclose(decoded, quantized, atol=1e-5)
            and torch.equal(codes, module.get_codes_from_indices(indices))
        )
    except Exception:
        return False


@pytest.mark.parametrize(
    ("make", "options", "shape"),
    [
        (residual, {"is_channel_first": True}, (2, 3, 9)),
        (residual, {"is_channel_first": True}, (2, 3, L)),
        (residual, {"is_channel_first": True, "dim": 6}, (2, 6, 4, 5)),
        (residual, {"dim": 6}, (2, 4, 5, 6)),
        (residual, {"dim": 6}, (9, 6)),
        (residual, {"levels": [4, 4], "dim": 6, "orthogonal_rotation": True}, (2, 9, 6)),
        (residual, {"keep_num_codebooks_dim": True}, (2, 9, 3)),
        (residual, {"keep_num_codebooks_dim": True, "is_channel_first": True}, (2, 3, 9)),
        (grouped, {}, (2, 4, 5, 12)),
        (grouped, {"accept_image_fmap": True}, (2, 12, 4, 5)),
        (grouped, {"accept_image_fmap": True}, (2, 12, 9)),
        (grouped, {"is_channel_first": True}, (2, 12, 9)),
        (grouped, {"accept_image_fmap": True, "is_channel_first": True}, (2, 12, 4, 5)),
    ],
)
def test_residual_fsq_decodes_in_every_layout(make, options, shape):
    like, module = make(**options)
    x = torch.randn(shape)
    assert not round_trips(like.eval(), x)
    assert round_trips(module.eval(), x)


def test_residual_fsq_layouts_agree():
    x = torch.randn(2, 4, 5, 12)
    _, last = grouped()
    _, image = grouped(accept_image_fmap=True)
    _, first = grouped(is_channel_first=True)
    image.load_state_dict(last.state_dict())
    first.load_state_dict(last.state_dict())
    quantized, indices = last(x)
    assert indices.shape == (2, 2, 4, 5, L)
    assert torch.equal(indices, image(x.movedim(-1, 1))[1])
    assert torch.equal(indices, first(x.movedim(-1, 1))[1].movedim(2, -1))
    assert_close(image(x.movedim(-1, 1))[0].movedim(1, -1), quantized)
    assert_close(last.rvqs[0](x[..., :6])[0], quantized[..., :6])


@pytest.mark.parametrize("is_channel_first", [False, True])
def test_residual_fsq_decodes_fewer_levels_without_dropout(is_channel_first):
    like, module = residual(dim=6, is_channel_first=is_channel_first)
    indices = torch.randint(0, 120, (2, 3, 9) if is_channel_first else (2, 9, 3))
    with pytest.raises(AssertionError, match="quantize dropout must be greater than 0"):
        like.get_output_from_indices(indices.movedim(1, -1) if is_channel_first else indices)
    padded = torch.cat(
        [indices, torch.full_like(indices[:, :1] if is_channel_first else indices[..., :1], -1)],
        1 if is_channel_first else -1,
    )
    assert torch.equal(module.get_output_from_indices(indices), module.get_output_from_indices(padded))
    assert torch.equal(module.get_codes_from_indices(indices), module.get_codes_from_indices(padded))


def test_residual_fsq_position_without_a_code_decodes_to_zeros():
    like, module = residual(dim=6)
    indices = torch.tensor([[[-1] * L, [3, -1, -1, -1]]])
    decoded = module.get_output_from_indices(indices)
    assert not decoded[0, 0].any()
    assert like.get_output_from_indices(indices)[0, 0].any()
    assert_close(decoded[0, 1], like.get_output_from_indices(indices)[0, 1])


def test_residual_fsq_autocast_on_the_cpu_changes_no_index():
    like, module = residual(dim=32)
    x = torch.randn(4, 100, 32)
    changed = []
    for each in (like, module):
        with torch.autocast("cpu", torch.bfloat16):
            indices = each(x)[1]
        changed.append(int((indices != each(x)[1]).sum()))
    assert changed[0] > 0
    assert changed[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_fsq_half_precision_module_quantizes_in_float32(dtype):
    like, module = (each.to(dtype) for each in residual(dim=6))
    x = torch.randn(2, 100, 6).to(dtype)
    exact = copy.deepcopy(module).float()
    quantized, indices = module(x)
    assert quantized.dtype == dtype
    assert module.scales.dtype == module.soft_clamp_input_value.dtype == torch.float32
    assert torch.equal(indices, exact(x.float())[1])
    assert not torch.equal(indices, like(x)[1])
    assert torch.equal(module.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("make", [residual, grouped])
def test_residual_fsq_dropout_draws_no_device_number_and_keeps_int32(make):
    like, module = make(dim=12, quantize_dropout=True)
    x = torch.randn(2, 9, 12)
    # A number on the device "meta" cannot be read.
    with pytest.raises(RuntimeError, match="meta"):
        copy.deepcopy(like).to("meta")(x.to("meta"))
    assert copy.deepcopy(module).to("meta")(x.to("meta"))[1].dtype == torch.int32
    numbers = set()
    for _ in range(30):
        indices = module(x)[1]
        assert indices.dtype == torch.int32
        is_dropped = (indices == -1).flatten(0, -2)
        assert torch.equal(is_dropped, is_dropped[:1].expand_as(is_dropped))
        numbers.add(int(is_dropped[0].sum()))
    assert numbers == set(range(L))
    with torch.no_grad():
        assert not (module(x)[1] == -1).any()
    assert not (module.eval()(x)[1] == -1).any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"colour": 1}, TypeError, "colour"),
        ({"num_codebooks": 2}, ValueError, "no num_codebooks in a residual quantizer, got 2"),
        ({"channel_first": True}, ValueError, "no channel_first"),
        ({"return_indices": False}, ValueError, "no return_indices"),
        ({"soft_clamp_input_value": 2.0}, ValueError, "pass bound_hard_clamp=False"),
        ({"num_quantizers": 0}, ValueError, "num_quantizers to be an integer of at least 1"),
        ({"levels": [5, 1]}, ValueError, "each of levels to be an integer of at least 2"),
        ({"quantize_dropout": True, "quantize_dropout_cutoff_index": L}, ValueError, "quantize_dropout_cutoff_index"),
    ],
)
def test_residual_fsq_wrong_argument_is_refused(options, error, message):
    for make in (own.ResidualFSQ, lambda **options: own.GroupedResidualFSQ(dim=12, groups=2, **options)):
        with pytest.raises(error, match=message):
            make(**{"levels": LEVELS, "num_quantizers": L, **options})


def test_residual_fsq_wrong_inputs_are_refused():
    _, module = residual(dim=6)
    with pytest.raises(ValueError, match=r"shape \[b, ..., 6\], got \(2, 6, 9\); .* pass is_channel_first=True"):
        module(torch.randn(2, 6, 9))
    with pytest.raises(ValueError, match=r"shape \[b, ..., n\] with n in \[1, 4\], got \(2, 9, 5\)"):
        module.get_output_from_indices(torch.zeros(2, 9, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"indices in \[-1, 120\).*got 120"):
        module.get_codes_from_indices(torch.full((2, 9, L), 120))
    _, module = grouped()
    with pytest.raises(ValueError, match=r"shape \[b, ..., 12\], got \(2, 12, 9\); .* pass accept_image_fmap=True"):
        module(torch.randn(2, 12, 9))
    with pytest.raises(ValueError, match=r"indices of shape \[2, b, ..., n\], got \(3, 2, 9, 4\)"):
        module.get_output_from_indices(torch.zeros(3, 2, 9, L, dtype=torch.int32))
    with pytest.raises(ValueError, match="dim to be a multiple of groups=5, got 12"):
        own.GroupedResidualFSQ(dim=12, groups=5, levels=LEVELS, num_quantizers=L)


@pytest.mark.parametrize(
    ("make", "options", "shape", "training"),
    [
        (residual, {"dim": 6}, (2, 9, 6), True),
        (grouped, {"accept_image_fmap": True, "num_quantizers": 2}, (2, 12, 3, 4), False),
    ],
)
def test_residual_fsq_compiles_to_one_graph_and_exports(make, options, shape, training):
    _, module = make(**options)
    module.train(training)
    x = torch.randn(shape, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    batches = {0: torch.export.Dim("b")}
    exported = torch.export.export(module, (x.detach(),), dynamic_shapes=(batches,)).module()
    outputs = []
    for function, inputs in ((module, x), (compiled, x), (exported, x), (module, x[:1]), (exported, x[:1])):
        quantized, indices = function(inputs)
        outputs.append([quantized, indices, torch.autograd.grad(quantized.square().sum(), x)[0]])
    for expected, actual in ((0, 1), (0, 2), (3, 4)):
        assert_close(outputs[actual], outputs[expected])


def test_residual_fsq_compiled_dropout_drops_the_last_levels():
    module = own.ResidualFSQ(levels=[4, 3], num_quantizers=3, quantize_dropout=True, quantize_dropout_cutoff_index=1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 9, 2, requires_grad=True)
    numbers = set()
    for _ in range(20):
        quantized, indices = compiled(x)
        number = int((indices[0, 0] >= 0).sum())
        numbers.add(number)
        # The seed is one with which that many levels run.
        seed = next(seed for seed in range(100) if module._dropout.draw(seed) == number)
        expected = module(x, rand_quantize_dropout_fixed_seed=seed)
        assert_close((quantized, indices), expected)
        gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (quantized, expected[0])]
        assert_close(*gradients)
    assert numbers == {2, 3}


def test_residual_fsq_is_copied_pickled_and_initialised_after_to_empty():
    _, module = grouped(bound_hard_clamp=False, soft_clamp_input_value=2.0, quantize_dropout=True)
    x = torch.randn(2, 9, 12)
    expected = module.eval()(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_close(other(x), expected)
    options = {"bound_hard_clamp": False, "soft_clamp_input_value": 2.0}
    with torch.device("meta"):
        empty = own.GroupedResidualFSQ(dim=12, groups=2, levels=LEVELS, num_quantizers=L, **options)
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_close(empty(x), expected)

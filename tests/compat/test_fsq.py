"""FSQ of the compatibility package against vector-quantize-pytorch and float64 formulas, and what is mended."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own

from .comparison import compare, copy_state

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

CASES = {
    "defaults": ({"levels": [8, 5, 5, 5]}, (2, 30, 4)),
    "levels_as_a_tuple": ({"levels": (4, 3)}, (2, 30, 2)),
    "projections": ({"levels": [8, 5, 5], "dim": 12}, (2, 30, 12)),
    "projections_without_bias": ({"levels": [8, 5, 5], "dim": 12, "projection_has_bias": False}, (2, 30, 12)),
    "two_codebooks": ({"levels": [5, 4], "num_codebooks": 2}, (2, 30, 4)),
    "two_codebooks_of_images": ({"levels": [5, 4], "num_codebooks": 2, "dim": 3}, (2, 3, 5, 6)),
    "kept_dimension": ({"levels": [5, 4], "keep_num_codebooks_dim": True}, (2, 30, 2)),
    "images": ({"levels": [5, 4, 3]}, (2, 3, 5, 6)),
    "videos": ({"levels": [5, 4, 3], "dim": 4}, (2, 4, 2, 3, 4)),
    "channel_first": ({"levels": [5, 4, 3], "dim": 4, "channel_first": True}, (2, 4, 30)),
    "channel_first_vectors": ({"levels": [5, 4, 3], "channel_first": True}, (30, 3)),
    "preserve_symmetry": ({"levels": [2, 4, 5], "preserve_symmetry": True}, (2, 30, 3)),
    "hard_clamp": ({"levels": [8, 5, 3], "bound_hard_clamp": True}, (2, 30, 3)),
    "symmetric_hard_clamp": ({"levels": [8, 5, 2], "preserve_symmetry": True, "bound_hard_clamp": True}, (2, 30, 3)),
    "noise": ({"levels": [8, 5, 2], "preserve_symmetry": True, "noise_dropout": 0.5}, (2, 30, 3)),
    "rotation": ({"levels": [5, 5, 5], "dim": 6, "orthogonal_rotation": True}, (2, 30, 6)),
    "rotated_images": (
        {"levels": [4, 4], "num_codebooks": 2, "orthogonal_rotation": True, "preserve_symmetry": True},
        (2, 4, 5, 6),
    ),
    "without_indices": ({"levels": [8, 5], "return_indices": False}, (2, 30, 2)),
    "other_dtypes": ({"levels": [8, 5], "allowed_dtypes": (torch.float64,), "scale": 2.0}, (2, 30, 2)),
    "not_forced": ({"levels": [8, 5], "force_quantization_f32": False, "dim": 3}, (2, 30, 3)),
}


def pair(**options) -> tuple[torch.nn.Module, own.FSQ]:
    """A module of vector-quantize-pytorch, and that of the compatibility package with its state."""
    like, module = stock.FSQ(**options), own.FSQ(**options)
    copy_state(like, module)
    return like, module


@pytest.mark.parametrize("name", CASES)
def test_fsq_trains_as_vector_quantize_pytorch(name):
    options, shape = CASES[name]
    compare(*pair(**options), [1.5 * torch.randn(shape) for _ in range(2)])


@pytest.mark.parametrize("name", [name for name in CASES if name != "without_indices"])
def test_fsq_decodes_as_vector_quantize_pytorch(name):
    options, shape = CASES[name]
    like, module = pair(**options)
    like.eval()
    quantized, indices = module.eval()(1.5 * torch.randn(shape))
    assert_close(module.indices_to_codes(indices), quantized)
    assert_close(module.indices_to_codes(indices), like.indices_to_codes(indices))
    assert torch.equal(module.indices_to_level_indices(indices), like.indices_to_level_indices(indices))
    assert torch.equal(module.implicit_codebook, like.implicit_codebook)
    assert torch.equal(module.codes_to_indices(module.implicit_codebook), torch.arange(like.codebook_size).int())


@pytest.mark.parametrize("name", CASES)
def test_fsq_attributes_are_those_of_vector_quantize_pytorch(name):
    like, module = pair(**CASES[name][0])
    for attribute, expected in vars(like).items():
        if not attribute.startswith("_") and attribute != "training":
            assert getattr(module, attribute) == expected, attribute
    expected = {key for key, _ in like.named_buffers()} - {"implicit_codebook"}
    assert {key for key, _ in module.named_buffers()} == expected | {"_steps", "_half_width", "_offset"}
    for key in ("_levels", "_basis"):
        assert torch.equal(getattr(module, key), getattr(like, key))
        assert getattr(module, key).dtype == getattr(like, key).dtype


@pytest.mark.parametrize("hard_clamp", [False, True])
@pytest.mark.parametrize("preserve_symmetry", [False, True])
def test_fsq_outputs_are_bitwise_those_of_vector_quantize_pytorch(preserve_symmetry, hard_clamp):
    levels = [3, 4, 7, 16]
    like, module = pair(levels=levels, preserve_symmetry=preserve_symmetry, bound_hard_clamp=hard_clamp)
    # With a clamp, many multiples of 1/12 lie in the middle between two levels.
    x = torch.cat([torch.randn(1, 500, 4), (torch.arange(-13, 14) / 12).reshape(1, -1, 1).expand(-1, -1, 4)], 1)
    for expected, actual in zip(like(x), module(x), strict=True):
        assert torch.equal(actual, expected)
    # vector-quantize-pytorch tests the same.
    quantized, indices = module(x)
    assert torch.equal(quantized, module.indices_to_codes(indices))


@pytest.mark.parametrize("hard_clamp", [False, True])
@pytest.mark.parametrize("preserve_symmetry", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fsq_value_and_slope_match_float64(dtype, preserve_symmetry, hard_clamp):
    size = torch.tensor([8, 5, 3, 40]).double()
    x = torch.randn(400, 4).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()

    def squash(z):
        return z.clamp(-1, 1) if hard_clamp else z.tanh()

    if preserve_symmetry:
        position = (size - 1) * squash(exact) / 2
        nearest = (position - (size - 1) / 2).round() + (size - 1) / 2
        half = (size - 1) / 2
    else:
        bound, offset, half = (size - 1) * 1.001 / 2, (size % 2 == 0) / 2, size // 2
        shift = offset / bound
        position = squash(exact + (shift if hard_clamp else shift.atanh())) * bound - offset
        nearest = position.round()
    (slope,) = torch.autograd.grad((position / half).sum(), exact)
    module = own.FSQ([8, 5, 3, 40], preserve_symmetry=preserve_symmetry, bound_hard_clamp=hard_clamp)
    quantized, indices = module(x)
    (grad,) = torch.autograd.grad(quantized.sum(), x)
    is_clear = ((position - nearest).abs() < 0.4999).all(-1)
    assert is_clear.double().mean() > 0.98
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    assert_close(quantized.double()[is_clear], (nearest / half)[is_clear].detach(), **tolerance)
    assert_close(grad.double(), slope, **tolerance)
    index = ((nearest + half) * torch.tensor([1, 8, 40, 120])).sum(-1).int()
    assert torch.equal(indices[is_clear], index[is_clear])


# The rest tests what is mended, and errors.


@pytest.mark.parametrize("options", [{"dim": 32}, {"orthogonal_rotation": True, "preserve_symmetry": True}])
def test_fsq_autocast_on_the_cpu_changes_no_index(options):
    like, module = pair(levels=[8] * 4, **options)
    x = torch.randn(4, 200, module.dim)
    changed = []
    for each in (like, module):
        with torch.autocast("cpu", torch.bfloat16):
            quantized, indices = each(x)
        changed.append(int((indices != each(x)[1]).sum()))
    assert changed[0] > 0
    assert changed[1] == 0
    assert torch.equal(quantized, module(x)[0])


def test_fsq_half_precision_module_quantizes_in_float32_and_decodes():
    like, module = pair(levels=[8, 8, 8], dim=6, orthogonal_rotation=True, preserve_symmetry=True)
    like, module = like.bfloat16(), module.bfloat16()
    x = torch.randn(2, 2000, 6).bfloat16()
    quantized, indices = module(x)
    assert quantized.dtype == torch.bfloat16
    exact = copy.deepcopy(module).float()
    assert torch.equal(indices, exact(x.float())[1])
    assert torch.equal(module.indices_to_codes(indices), quantized)
    with pytest.raises(RuntimeError, match="dtype"):
        like.indices_to_codes(like(x)[1])


def test_fsq_minus_one_decodes_to_zeros():
    like, module = pair(levels=[5, 4], dim=3, num_codebooks=2)
    assert like.indices_to_codes(torch.tensor([[[-1, -1]]])).any()
    decoded = module.indices_to_codes(torch.tensor([[[-1, -1], [3, -1], [3, 4]]], dtype=torch.int32))
    assert not decoded[0, 0].any()
    code = own.FSQ([5, 4]).indices_to_codes(torch.tensor([[3]]))[0, 0]
    assert_close(decoded[0, 1], module.project_out.weight[:, :2] @ code + module.project_out.bias)
    assert own.FSQ([5, 4]).indices_to_codes(torch.tensor([[-1, 19]]))[0, 0].tolist() == [0, 0]


def test_fsq_indices_are_exact_for_large_codebooks():
    levels = [64] * 5
    like = stock.FSQ(levels, return_indices=False)
    module = own.FSQ(levels)
    assert module.codebook_size == 2**30
    quantized, indices = module(torch.randn(1, 500, 5))
    assert torch.equal(module.indices_to_codes(indices), quantized)
    # float32 rounds the sum.
    assert not torch.equal(like.codes_to_indices(quantized.detach()), indices)


def test_fsq_large_codebook_is_made_only_when_it_is_read():
    module = own.FSQ([16] * 6)
    assert sum(buffer.numel() for buffer in module.buffers()) == 30
    assert own.FSQ([5, 4]).implicit_codebook.shape == (20, 2)
    assert own.FSQ([256] * 4, return_indices=False)(torch.zeros(1, 2, 4))[1] is None


def test_fsq_noise_dropout_is_the_probability():
    like, module = pair(levels=[9], preserve_symmetry=True, noise_dropout=0.1)
    shares = []
    for each in (like, module):
        quantized, indices = each(torch.zeros(1, 20000, 1))
        shares.append(float((quantized != 0).float().mean()))
    assert abs(shares[0] - 0.5) < 0.02
    assert abs(shares[1] - 0.1) < 0.01
    # The indices are those without noise.
    assert indices.unique().tolist() == [4]


def test_fsq_quantizes_a_matrix_of_vectors():
    like, module = pair(levels=[8, 5], dim=3)
    x = torch.randn(10, 3)
    with pytest.raises(Exception, match="pattern"):
        like(x)
    quantized, indices = module(x)
    assert torch.equal(quantized, module(x[None])[0][0])
    assert_close(module.indices_to_codes(indices), quantized)


def test_fsq_nan_stays_nan_and_has_an_index():
    x = torch.tensor([[[float("nan"), 0.3], [0.2, 0.3]]])
    quantized, indices = own.FSQ([5, 5])(x)
    assert quantized.isnan().tolist() == [[[True, False], [False, False]]]
    # The first level, beside that of the other feature.
    assert int(indices[0, 0]) == int(indices[0, 1]) // 5 * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, "at least one feature"),
        ({"levels": [5, 1]}, "each of levels to be an integer of at least 2"),
        ({"levels": [5, 2]}, "pass preserve_symmetry=True"),
        ({"levels": [1001]}, "at most 1000"),
        ({"levels": [256] * 4}, "at most 2147483648 codes"),
        ({"levels": [5], "num_codebooks": 2, "keep_num_codebooks_dim": False}, "keep_num_codebooks_dim=True"),
        ({"levels": [5], "noise_dropout": 0.5}, "preserve_symmetry=True with noise_dropout"),
        ({"levels": [5], "noise_dropout": 1.5}, r"noise_dropout to lie in \[0, 1\]"),
        ({"levels": [5], "dim": 0}, "dim to be an integer of at least 1"),
    ],
)
def test_fsq_wrong_argument_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        own.FSQ(**options)


def test_fsq_wrong_inputs_are_refused():
    with pytest.raises(TypeError, match="colour"):
        own.FSQ([5, 4], colour=1)
    with pytest.warns(UserWarning, match="unequal numbers of levels"):
        own.FSQ([5, 4], orthogonal_rotation=True)
    module = own.FSQ([5, 4], dim=6, num_codebooks=2)
    with pytest.raises(ValueError, match=r"z of shape \[b, n, 6\], got \(2, 6, 7\); .* channel_first=True"):
        module(torch.randn(2, 6, 7))
    with pytest.raises(
        ValueError, match=r"z of shape \[b, 6, ...\], got \(2, 7, 8, 6\); four or more dimensions are channel-first"
    ):
        module(torch.randn(2, 7, 8, 6))
    with pytest.raises(ValueError, match=r"z of dtype float16, bfloat16, float32 or float64, got torch\.int64"):
        module(torch.zeros(2, 7, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices of shape \[..., 2\], got \(2, 7\)"):
        module.indices_to_codes(torch.zeros(2, 7, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"indices in \[-1, 20\).*got 20"):
        module.indices_to_codes(torch.tensor([[[0, 20]]]))
    with pytest.raises(ValueError, match="integer"):
        module.indices_to_codes(torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match=r"codes of shape \[..., 2\]"):
        module.codes_to_indices(torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "training"),
    # Noise alone depends on the mode.
    [
        ("noise", True),
        ("noise", False),
        ("two_codebooks_of_images", True),
        ("rotation", True),
        ("without_indices", True),
    ],
)
def test_fsq_compiles_to_one_graph_and_exports(name, training):
    options, shape = CASES[name]
    module = own.FSQ(**options).train(training)
    x = torch.randn(shape, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    batches = {0: torch.export.Dim("b")}
    exported = torch.export.export(module, (x.detach(),), dynamic_shapes=(batches,)).module()
    outputs = []
    for function, inputs in ((module, x), (compiled, x), (exported, x), (module, x[:1]), (exported, x[:1])):
        torch.manual_seed(1)
        quantized, indices = function(inputs)
        gradient = torch.autograd.grad(quantized.square().sum(), x)[0]
        outputs.append([value for value in (quantized, indices, gradient) if value is not None])
    for expected, actual in ((0, 1), (0, 2), (3, 4)):
        assert_close(outputs[actual], outputs[expected])


def test_fsq_is_copied_pickled_and_initialised_after_to_empty():
    module = own.FSQ([5, 5, 5], dim=7, orthogonal_rotation=True)
    x = torch.randn(2, 9, 7)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[0], module(x)[0])
    with torch.device("meta"):
        empty = own.FSQ([5, 5, 5], dim=7, orthogonal_rotation=True)
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(empty(x)[0], module(x)[0])
    assert torch.equal(empty.double().float()(x)[1], module(x)[1])

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dlvae_kernels import FiniteScalarQuantizer, LookupFreeQuantizer

LEVELS = ([8, 5, 5, 5], [3], [4, 7, 6], [1000, 999])


def formula(x: torch.Tensor, levels: list[int], preserve_symmetry: bool = False) -> tuple[torch.Tensor, ...]:
    """Codes in float64 by the equations of the papers, their straight-through gradient, and where they nearly tie."""
    x = x.double().requires_grad_()
    size = torch.tensor(levels).double()
    if preserve_symmetry:
        position = (size - 1) * (x.tanh() + 1) / 2 + 0.5
        codes, smooth = position.floor() * 2 / (size - 1) - 1, x.tanh()
    else:
        half = (size - 1) * 1.001 / 2
        offset = torch.where(size % 2 == 0, 0.5, 0.0)
        bounded = (x + (offset / half).atanh()).tanh() * half - offset
        position = bounded + 0.5
        codes, smooth = bounded.round() / (size // 2), bounded / (size // 2)
    (slope,) = torch.autograd.grad(smooth.sum(), x)
    return codes.detach(), slope, (position - position.round()).abs() < 1e-4


@pytest.mark.small
def test_fsq_levels_by_hand():
    layer = FiniteScalarQuantizer([4, 3], channel_last=True)
    x = torch.tensor([[-9.0, 9.0], [0.0, 0.0], [9.0, -9.0], [-0.7, 0.3]])
    quantized, indices = layer(x)
    # Four levels have the codes -1, -1/2, 0, 1/2; three have -1, 0, 1. The first level has the lowest place value.
    assert quantized.tolist() == [[-1.0, 1.0], [0.0, 0.0], [0.5, -1.0], [-0.5, 0.0]]
    assert indices.tolist() == [0 + 4 * 2, 2 + 4 * 1, 3 + 4 * 0, 1 + 4 * 1]
    symmetric = FiniteScalarQuantizer([2, 4], preserve_symmetry=True, channel_last=True)
    assert symmetric(x).quantized.tolist() == [
        [-1.0, 1.0],
        [1.0, pytest.approx(1 / 3)],
        [1.0, -1.0],
        [-1.0, pytest.approx(1 / 3)],
    ]


@pytest.mark.parametrize("preserve_symmetry", [False, True])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fsq_value_and_slope_match_float64(levels, dtype, preserve_symmetry):
    layer = FiniteScalarQuantizer(levels, preserve_symmetry=preserve_symmetry, channel_last=True)
    x = (3 * torch.randn(500, len(levels))).to(dtype).requires_grad_()
    quantized, indices = layer(x)
    (grad,) = torch.autograd.grad(quantized.sum(), x)
    codes, slope, is_near_tie = formula(x.detach(), levels, preserve_symmetry)
    # float32 rounds the position of one of many levels.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    error = (quantized - codes).abs() * ~is_near_tie
    assert float(error.detach().max()) <= (1e-6 if max(levels) < 100 or dtype == torch.float64 else 3e-3)
    assert is_near_tie.double().mean() < (0.01 if max(levels) < 100 else 0.5)
    torch.testing.assert_close(grad.double(), slope, rtol=tolerance, atol=tolerance)
    # The codes are exact: as decoded from their indices, which lie in range.
    assert 0 <= int(indices.min()) <= int(indices.max()) < layer.codebook_size == math.prod(levels)
    assert torch.equal(layer.decode(indices).to(dtype), quantized) or dtype == torch.float64
    torch.testing.assert_close(layer.decode(indices).to(dtype), quantized.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("preserve_symmetry", [False, True])
def test_fsq_every_index_decodes_to_a_code_that_encodes_to_it(preserve_symmetry):
    layer = FiniteScalarQuantizer([5, 4, 3], preserve_symmetry=preserve_symmetry, channel_last=True)
    indices = torch.arange(60, dtype=torch.int32)
    codes = layer.decode(indices)
    assert float(codes.min()) == -1
    assert len(codes.unique(dim=0)) == 60
    # Any x that the bound maps to the code.
    x = (0.99 * codes).atanh()
    if preserve_symmetry:
        assert torch.equal(layer.encode(x), indices)
    else:
        half = torch.tensor([2.002, 1.5015, 1.001])
        offset = torch.tensor([0, 0.5, 0])
        x = ((codes * torch.tensor([2, 2, 1]) + offset) / half).atanh() - (offset / half).atanh()
        assert torch.equal(layer.encode(x), indices)


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        ({"levels": [8, 5, 5, 5]}, {}),
        ({"levels": [8, 5, 5, 5], "dim": 12}, {}),
        ({"levels": [5, 4], "dim": 7, "num_codebooks": 3}, {}),
        ({"levels": [5, 4], "num_codebooks": 2, "dim": 3, "projection_has_bias": False}, {"projection_bias": False}),
        ({"levels": [2, 4, 6], "preserve_symmetry": True}, {}),
    ],
)
def test_fsq_equals_vector_quantize_pytorch(arguments, own):
    module = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")
    like = module.FSQ(**arguments)
    layer = FiniteScalarQuantizer(
        **{key: value for key, value in arguments.items() if key != "projection_has_bias"}, **own
    )
    layer.load_state_dict(like.state_dict())
    results = []
    for function, decode in ((like, like.indices_to_codes), (layer, layer.decode)):
        # Four dimensions are a channel-first map for both.
        x = torch.randn(2, layer.dim, 6, 5, generator=torch.Generator().manual_seed(1)).mul(2).requires_grad_()
        quantized, indices = function(x)
        grads = torch.autograd.grad(quantized.square().sum(), [x, *function.parameters()])
        results.append((quantized, indices, decode(indices), *grads))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_fsq_maps_of_both_layouts_agree():
    first = FiniteScalarQuantizer([5, 4, 3], dim=6, num_codebooks=2)
    last = FiniteScalarQuantizer([5, 4, 3], dim=6, num_codebooks=2, channel_last=True)
    last.load_state_dict(first.state_dict())
    for spatial in ((), (7,), (3, 4), (2, 3, 4)):
        x = torch.randn(2, 6, *spatial)
        quantized, indices = first(x)
        assert quantized.shape == x.shape
        assert indices.shape == (2, *spatial, 2)
        assert torch.equal(first.encode(x), indices)
        moved = last(x.movedim(1, -1))
        assert torch.equal(moved.indices, indices)
        torch.testing.assert_close(moved.quantized.movedim(-1, 1), quantized)
        torch.testing.assert_close(first.decode(indices), quantized)


def test_fsq_minus_one_decodes_to_zeros():
    layer = FiniteScalarQuantizer([5, 4], dim=3, num_codebooks=2)
    decoded = layer.decode(torch.tensor([[[-1, -1], [3, -1], [3, 4]]]))
    assert not decoded[0, :, 0].any()
    bias, weight = layer.project_out.bias, layer.project_out.weight
    codes = FiniteScalarQuantizer([5, 4], channel_last=True).decode(torch.tensor([3]))[0]
    torch.testing.assert_close(decoded[0, :, 1], weight[:, :2] @ codes + bias)
    assert FiniteScalarQuantizer([5, 4]).decode(torch.tensor([[-1, 19]]))[0, :, 0].tolist() == [0, 0]


@pytest.mark.parametrize("index_dtype", [torch.uint16, torch.int32, torch.int64])
def test_fsq_index_dtype_is_kept_and_decoded(index_dtype):
    layer = FiniteScalarQuantizer([16] * 4, index_dtype=index_dtype)
    x = 3 * torch.randn(2, 4, 9)
    quantized, indices = layer(x)
    assert indices.dtype == layer.encode(x).dtype == index_dtype
    assert torch.equal(indices.long(), FiniteScalarQuantizer([16] * 4)(x).indices.long())
    assert torch.equal(layer.decode(indices), quantized)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("layer", [FiniteScalarQuantizer([5, 4]), LookupFreeQuantizer(16)], ids=["fsq", "lfq"])
def test_decode_takes_indices_of_any_integer_dtype(dtype, layer):
    indices = torch.randint(0, 16, (2, 7))
    assert torch.equal(layer.decode(indices.to(dtype)), layer.decode(indices))


@pytest.mark.parametrize("level", [2**24, 2**25])
def test_fsq_index_of_last_of_many_levels_is_below_k(level):
    layer = FiniteScalarQuantizer([level], preserve_symmetry=True)
    assert layer.encode(torch.tensor([[30.0], [-30.0], [torch.nan]])).tolist() == [level - 1, 0, 0]


def test_fsq_indices_of_large_codebooks_are_exact():
    layer = FiniteScalarQuantizer([7] * 20, index_dtype=torch.int64, channel_last=True)
    indices = torch.randint(0, 7**20, (50,))
    torch.testing.assert_close(layer.encode(layer.decode(indices).mul(3)), _outermost(indices))


def _outermost(indices: torch.Tensor) -> torch.Tensor:
    """Indices whose digits to the base 7 are 0, 3 and 6: three times a code is beyond the outermost level, or 0."""
    digits = torch.stack([indices // 7**i % 7 for i in range(20)], 1)
    bounded = ((digits - 3) / 3 * 3).double().tanh() * 3.003
    return ((bounded.round().long() + 3) * torch.tensor([7**i for i in range(20)])).sum(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fsq_half_precision_and_autocast_compute_in_float32(dtype):
    layer = FiniteScalarQuantizer([8, 5, 5], dim=6)
    x = torch.randn(4, 6, 10).to(dtype).requires_grad_()
    expected = layer(x.float())
    out = layer(x)
    assert out.quantized.dtype == dtype
    assert torch.equal(out.indices, expected.indices)
    torch.testing.assert_close(out.quantized, expected.quantized.to(dtype))
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer(x.float()).quantized, expected.quantized)
    out.quantized.float().square().sum().backward()
    assert x.grad.isfinite().all()
    whole = FiniteScalarQuantizer([8, 5, 5], dim=6).to(dtype)
    assert whole(x).quantized.dtype == whole.decode(out.indices).dtype == dtype


def test_fsq_values_that_are_not_finite_stay_in_range():
    layer = FiniteScalarQuantizer([4, 3], index_dtype=torch.int64, channel_last=True)
    x = torch.tensor([[torch.inf, -torch.inf], [torch.nan, 0.0]])
    quantized, indices = layer(x)
    assert quantized[0].tolist() == [0.5, -1.0]
    assert quantized[1, 0].isnan()
    assert quantized[1, 1] == 0
    assert indices.tolist() == [3, 4]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", [3, 6])
def test_fsq_compiled_whole_and_exported_match_eager(training, dim):
    layer = FiniteScalarQuantizer([8, 5, 4], dim=dim).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (torch.randn(2, dim, 5),)).module()
    x = torch.randn(2, dim, 5, requires_grad=True)
    results = []
    for function in (layer, compiled, exported):
        quantized, indices = function(x)
        (grad,) = torch.autograd.grad(quantized.square().sum(), x)
        results.append((quantized, indices, grad))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected)
    decoded = torch.compile(layer.decode, fullgraph=True, backend="aot_eager")(results[0][1])
    torch.testing.assert_close(decoded, layer.decode(results[0][1]))


def test_fsq_derivatives_are_those_of_the_bound():
    layer = FiniteScalarQuantizer([3, 5], channel_last=True)
    x, tangent = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)

    def bounded(x):
        return x.tanh() * torch.tensor([1.001, 1.001], dtype=torch.float64)

    def quantized(x):
        return layer(x).quantized

    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.vmap(torch.func.grad(lambda row: f(row[None]).sum()))(x),
        lambda f: torch.func.hessian(lambda x: f(x).sum())(x),
    ):
        torch.testing.assert_close(transform(quantized), transform(bounded))


def test_fsq_repeated_runs_are_bitwise_equal():
    layer = FiniteScalarQuantizer([8, 5, 4], dim=8)
    x = torch.randn(2, 8, 50, requires_grad=True)
    runs = []
    for _ in range(2):
        quantized, indices = layer(x)
        runs.append((quantized, indices, *torch.autograd.grad(quantized.square().sum(), [x, *layer.parameters()])))
    assert all(map(torch.equal, *runs))


def test_fsq_empty_batch_gives_empty_outputs():
    layer = FiniteScalarQuantizer([5, 4], dim=6)
    out = layer(torch.empty(0, 6, 3, requires_grad=True))
    assert [tuple(each.shape) for each in out] == [(0, 6, 3), (0, 3)]
    out.quantized.sum().backward()
    assert layer.decode(out.indices).shape == (0, 6, 3)


def test_fsq_to_empty_and_reset_parameters_restore_the_levels():
    x = torch.randn(2, 6, 5)
    with torch.device("meta"):
        layer = nn.Sequential(FiniteScalarQuantizer([8, 5], dim=6))
    layer.to_empty(device="cpu")
    for value in (*layer.parameters(), *layer.buffers()):
        value.data.fill_(0)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    like = FiniteScalarQuantizer([8, 5], dim=6)
    like.load_state_dict(layer[0].state_dict())
    assert torch.equal(layer(x).quantized, like(x).quantized)
    assert like.project_in.weight.any()


def test_fsq_repr_shows_every_argument():
    layer = FiniteScalarQuantizer([8, 5], dim=6, num_codebooks=2, index_dtype=torch.int64)
    assert repr(layer).splitlines()[1] == (
        "  levels=(8, 5), dim=6, num_codebooks=2, preserve_symmetry=False, projection_bias=True,"
        " index_dtype=torch.int64, channel_last=False"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": []}, r"expected levels of at least one feature, got none"),
        ({"levels": [2, 4]}, r"expected each of levels in \[3, 1000\], got \(2, 4\); pass preserve_symmetry=True"),
        ({"levels": [1001]}, r"expected each of levels in \[3, 1000\], got \(1001,\)"),
        ({"levels": [1], "preserve_symmetry": True}, r"expected each of levels to be an integer of at least 2, got 1"),
        ({"levels": [5], "num_codebooks": 0}, r"expected num_codebooks to be an integer of at least 1, got 0"),
        ({"levels": [5], "dim": 0}, r"expected dim to be an integer of at least 1, got 0"),
        ({"levels": [5], "index_dtype": torch.int8}, r"expected index_dtype to be one of .*, got torch.int8"),
        (
            {"levels": [17, 16, 16, 16], "index_dtype": torch.uint16},
            r"expected index_dtype to hold 69632 codes, got torch.uint16; pass torch.int64",
        ),
        ({"levels": [256] * 4}, r"expected index_dtype to hold 4294967296 codes, got torch.int32; pass torch.int64"),
        (
            {"levels": [2**7] * 10, "index_dtype": torch.int64},
            r"expected index_dtype to hold 1180591620717411303424 codes, got torch.int64; pass fewer codes",
        ),
    ],
)
def test_fsq_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        FiniteScalarQuantizer(**arguments)


@pytest.mark.parametrize(
    ("dim", "bad", "message"),
    [
        (2, torch.zeros(2, 3), r"expected inputs of shape \[B, 2, ...\], got \(2, 3\)"),
        (2, torch.zeros(2, 7, 2), r"expected inputs of shape .*; for channels-last inputs .* pass channel_last=True"),
        (2, torch.zeros(2, 2).int(), r"expected inputs of dtype .*, got torch.int32"),
        (4, torch.zeros(2, 4).double(), r"expected inputs of the layer's dtype, torch.float32, .*, got torch.float64"),
        (4, torch.zeros(2, 4, device="meta"), r"expected inputs on the device of project_in.weight, cpu, got meta"),
        (2, torch.zeros(2, 2, device="meta"), r"expected inputs on the device of the layer, cpu, got meta"),
    ],
)
def test_fsq_bad_inputs_raise(dim, bad, message):
    with pytest.raises(ValueError, match=message):
        FiniteScalarQuantizer([5, 4], dim=dim)(bad)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(2, 3), r"expected indices of dtype torch.int64 or another integer, got torch.float32"),
        (torch.zeros(2, 3).int(), r"expected indices of shape \[B, \*spatial, 2\], got \(2, 3\)"),
        (torch.tensor([[0, 20]]).int(), r"expected indices in \[-1, 20\) .*, got 20"),
        (torch.tensor([[-2, 3]]), r"expected indices in \[-1, 20\) .*, got -2"),
    ],
)
def test_fsq_bad_indices_raise(indices, message):
    with pytest.raises(ValueError, match=message):
        FiniteScalarQuantizer([5, 4], num_codebooks=2).decode(indices)

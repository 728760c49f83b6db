from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dlvae_kernels import kept_softmax
from dlvae_kernels.backends import choose, forced_backend
from dlvae_kernels.testing import assert_accurate

from .cases import DTYPES, HALVES, layouts, vectors

OPS = ("kept_softmax_fwd", "kept_softmax_bwd", "sparse_decode_fwd", "sparse_decode_bwd")
# (N, K, D, k): k is small, because the interpreter sums the selected values one by one.
SIZES = ((0, 5, 4, 2), (1, 1, 1, 1), (9, 1, 8, 2), (9, 17, 3, 7), (20, 130, 20, 1))


def case(n, num_codes, d, k, device, dtype=torch.float32):
    """Logits of about 1; indices that repeat within a vector."""
    x, weight, bias = vectors(n, d, device), vectors(num_codes, d, device) / d**0.5, vectors(num_codes, 1, device)[:, 0]
    indices = torch.randint(0, num_codes, (n, k), device=device)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), indices


def formula(x, weight, bias, indices):
    return torch.nn.functional.linear(x, weight, bias).softmax(-1).gather(-1, indices)


def run(function, inputs, indices, grad):
    """Values, and the gradients of x, weight and, where there is one, bias."""
    leaves = [None if each is None else each.detach().requires_grad_() for each in inputs]
    values = function(*leaves, indices)
    learned = [each for each in leaves if each is not None]
    return values.detach(), *torch.autograd.grad(values, learned, grad.to(values.dtype))


def assert_like_float64(inputs, indices):
    """The error is at most twice that of the formula in the widest dtype of the inputs."""
    grad = torch.randn(indices.shape, device=indices.device)
    actual = run(kept_softmax, inputs, indices, grad)
    exact, expression = (
        run(formula, [None if each is None else each.to(dtype) for each in inputs], indices, grad)
        for dtype in (torch.float64, inputs[1].dtype)
    )
    assert actual[0].dtype == torch.promote_types(inputs[0].dtype, torch.float32)
    for given, each in zip(actual[1:], (each for each in inputs if each is not None), strict=True):
        assert given.dtype == each.dtype
    for each in zip(actual, exact, expression, strict=True):
        assert_accurate(*each, floor=4e-3 if inputs[0].dtype in HALVES else 4e-6)


@pytest.mark.small
@pytest.mark.every_isa
def test_kept_softmax_four_codes_by_hand(device):
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], device=device, requires_grad=True)
    weight = torch.zeros(4, 2, device=device, requires_grad=True)
    bias = torch.tensor([1.0, 2.0, 4.0, 1.0], device=device).log().requires_grad_()
    values = kept_softmax(x, weight, bias, torch.tensor([[2, 0], [1, 1]], device=device))
    torch.testing.assert_close(values, torch.tensor([[0.5, 0.125], [0.25, 0.25]], device=device))
    values[:, 0].sum().backward()
    # The gradient of the logits of a vector is v (1 - p) at its code and -v p at the others.
    first = torch.tensor([-1.0, -2.0, 4.0, -1.0], device=device) / 16
    second = torch.tensor([-1.0, 6.0, -4.0, -1.0], device=device) / 32
    torch.testing.assert_close(bias.grad, first + second)
    torch.testing.assert_close(weight.grad, torch.stack([first, 2 * second], dim=1))
    assert not x.grad.any()


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_kept_softmax_any_size_and_dtype_equals_float64(device, size, dtype):
    *inputs, indices = case(*size, device, dtype)
    assert_like_float64(inputs, indices)


def test_kept_softmax_several_tiles_and_chunks_match_float64(device, monkeypatch):
    if forced_backend() == "native":
        # The sizes of native kernels are fixed: chunks of 512 codes, blocks of at most 128 vectors, and superblocks of
        # 256 vectors for this number of codes.
        *inputs, indices = case(600, 8300, 20, 3, device)
    elif forced_backend() == "emulated":
        # Chunks of 128 vectors, and chains of at most 1024 vectors or codes.
        *inputs, indices = case(300, 1200, 40, 3, device)
    else:
        module, name, few = {
            "triton": ("triton.architectures", "wanted_programs", lambda: 1),
            "reference": ("reference.kept_softmax", "_CHUNK_ELEMENTS", 3 * 130),
        }[forced_backend()]
        monkeypatch.setattr(importlib.import_module(f"dlvae_kernels.backends.{module}"), name, few)
        *inputs, indices = case(40, 130, 140, 1, device)
    assert_like_float64(inputs, indices)


@pytest.mark.parametrize("dtype", HALVES)
def test_kept_softmax_half_precision_beside_float32_matches_float64(device, dtype):
    x, weight, bias, indices = case(15, 40, 9, 2, device)
    assert_like_float64((x.to(dtype), weight, bias), indices)


def test_kept_softmax_without_bias_matches_float64(device):
    x, weight, _, indices = case(15, 40, 9, 2, device)
    assert_like_float64((x, weight, None), indices)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", layouts(2, 2, torch.device("cpu")))
def test_kept_softmax_any_strides_match_float64(device, layout):
    x = layouts(6, 12, device)[layout]
    weight, bias = torch.randn(12, 24, device=device).T, torch.randn(24, 2, device=device)[:, 0]
    indices = torch.randint(0, 24, (2, *x.shape[:-1]), device=device).movedim(0, -1)
    assert_like_float64((x, weight, bias), indices)


@pytest.mark.float64
@pytest.mark.parametrize("has_bias", [True, False])
def test_kept_softmax_gradcheck_passes(device, has_bias):
    *inputs, indices = case(5, 6, 3, 4, device, torch.float64)
    leaves = [each.requires_grad_() for each in inputs[: 2 + has_bias]]
    assert torch.autograd.gradcheck(lambda x, w, b=None: kept_softmax(x, w, b, indices), leaves)


@pytest.mark.every_isa
def test_kept_softmax_gradients_are_only_those_needed(device):
    *inputs, indices = case(9, 7, 3, 2, device)
    values, sums = torch.ops.dlvae.kept_softmax_fwd(*inputs, indices)
    saved = values, values, sums, *inputs, indices
    whole = torch.ops.dlvae.kept_softmax_bwd(*saved, True, True, True)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        for need, given, expected in zip(needs, torch.ops.dlvae.kept_softmax_bwd(*saved, *needs), whole, strict=True):
            assert torch.equal(given, expected) if need else given.numel() == 0


def test_kept_softmax_huge_logits_match_the_formula(device):
    x, weight, bias, indices = case(9, 40, 8, 2, device)
    x, weight = x * 1e4, weight * 1e4
    values, *grads = run(kept_softmax, (x, weight, bias), indices, torch.ones(9, 2, device=device))
    torch.testing.assert_close(values, formula(x, weight, bias, indices))
    assert all(each.isfinite().all() for each in grads)


@pytest.mark.parametrize("spread", [10, 100])
def test_kept_softmax_values_near_one_match_float64(device, spread):
    """The largest logits are selected: v is near 1, and its gradient is the small difference to 1."""
    x, weight, bias, _ = case(16, 40, 64, 2, device)
    x = x * spread / 8
    assert_like_float64((x, weight, bias), (x @ weight.T + bias).topk(2, dim=1).indices)


@pytest.mark.every_isa
def test_kept_softmax_nan_stays_in_its_vector(device):
    x, weight, bias, indices = case(9, 40, 8, 2, device)
    x[3, 2] = torch.nan
    values, grad_x, *_ = run(kept_softmax, (x, weight, bias), indices, torch.ones(9, 2, device=device))
    expected, expected_x, *_ = run(formula, (x, weight, bias), indices, torch.ones(9, 2, device=device))
    assert values[3].isnan().all()
    torch.testing.assert_close(values, expected, equal_nan=True)
    torch.testing.assert_close(grad_x, expected_x, equal_nan=True)


def test_kept_softmax_bias_of_minus_infinity_gives_zero(device):
    x, weight, bias, indices = case(9, 300, 8, 3, device)
    # The codes of the first tile, and some of the next.
    bias[:200], indices[:, 0] = -torch.inf, 7
    grad = torch.randn(9, 3, device=device)
    actual, expected = (run(function, (x, weight, bias), indices, grad) for function in (kept_softmax, formula))
    assert not actual[0][:, 0].any()
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair)
    bias[:] = -torch.inf
    assert kept_softmax(x, weight, bias, indices).isnan().all()


@pytest.mark.large
def test_kept_softmax_repeated_call_is_bitwise_reproducible(device):
    torch.use_deterministic_algorithms(False)
    *inputs, indices = case(3000, 300, 16, 8, device)
    first, second = (run(kept_softmax, inputs, indices, torch.ones(3000, 8, device=device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kept_softmax_autocast_rounds_nothing(device):
    *inputs, indices = case(9, 30, 16, 2, device)
    grad = torch.ones(9, 2, device=device)
    expected = run(kept_softmax, inputs, indices, grad)
    with torch.autocast(device.type, torch.bfloat16):
        actual = run(kept_softmax, inputs, indices, grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any call returns, within the operations too."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("dlvae::")
        if name in OPS:
            with self:
                return choose(name, *args)(*args)
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return out


def test_kept_softmax_n_by_k_matrix_is_never_materialised(device):
    is_interpreted = device.type == "cpu" and forced_backend() == "triton"
    n, num_codes = (128, 512) if is_interpreted else (4096, 4096)
    *inputs, indices = case(n, num_codes, 8, 1, device)
    with _Largest() as largest:
        run(kept_softmax, inputs, indices, torch.ones(n, 1, device=device))
    assert 0 < largest.bytes <= 4 * n * num_codes // 2
    with _Largest() as largest:
        formula(*inputs, indices)
    assert largest.bytes == 4 * n * num_codes


def test_kept_softmax_opcheck_and_compile_pass(device):
    *inputs, indices = case(6, 5, 3, 2, device)
    values, sums = torch.ops.dlvae.kept_softmax_fwd(*inputs, indices)
    for bias in (inputs[2], None):
        torch.library.opcheck(torch.ops.dlvae.kept_softmax_fwd, (*inputs[:2], bias, indices))
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(torch.ops.dlvae.kept_softmax_bwd, (values, values, sums, *inputs, indices, *needs))
    compiled = torch.compile(kept_softmax, fullgraph=True, backend="aot_eager")
    grad = torch.ones(6, 2, device=device)
    for each in (inputs, (*inputs[:2], None)):
        outs = [run(function, each, indices, grad) for function in (compiled, kept_softmax)]
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


ZERO = torch.zeros(2, 1).long()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 4)}, r"expected x of shape \[..., 3\], with the D of weight, got \(2, 4\)"),
        ({"weight": torch.ones(4, 3).double()}, r"expected weight of dtype .*, got torch.float64"),
        ({"weight": torch.ones(0, 3)}, r"expected weight of shape \[K, D\].*, got \(0, 3\)"),
        ({"bias": torch.ones(3)}, r"expected bias of shape \[4\] and dtype torch.float32, .*, got \(3,\)"),
        ({"bias": torch.ones(4).half()}, r"expected bias of shape .*, got \(4,\) and torch.float16"),
        ({"bias": torch.ones(4, device="meta")}, r"expected bias on the device of weight, cpu, got meta"),
        ({"indices": ZERO[0]}, r"expected indices of shape \[..., k\], .*, got \(1,\)"),
        ({"indices": ZERO[:, :0]}, r"expected indices of shape .* k >= 1, got \(2, 0\)"),
        ({"indices": ZERO.int()}, r"expected indices of dtype .*, got torch.int32"),
        ({"indices": ZERO.to("meta")}, r"expected indices on the device of weight, cpu, got meta"),
        ({"indices": ZERO + 4}, r"expected indices in \[0, 4\), got 4"),
        ({"indices": ZERO - 1}, r"expected indices in \[0, 4\), got -1"),
    ],
)
def test_kept_softmax_bad_input_raises(changes, message):
    arguments = {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4), "indices": ZERO}
    with pytest.raises(ValueError, match=message):
        kept_softmax(**{**arguments, **changes})

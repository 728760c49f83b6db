from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dlvae_kernels import code_entropy, entropy
from dlvae_kernels.backends import choose, forced_backend
from dlvae_kernels.testing import assert_accurate

from .cases import DTYPES, HALVES, layouts, vectors

OPS = ("code_entropy_fwd", "code_entropy_bwd")
# (N, K, D): empty, one code, one feature, around the tiles of every backend.
SIZES = ((0, 5, 4), (1, 1, 1), (9, 1, 8), (9, 17, 3), (70, 130, 20))


def case(n, num_codes, d, device, dtype=torch.float32):
    """Squared distances of about 2."""
    scale = d**-0.5
    return (vectors(n, d, device) * scale).to(dtype), (vectors(num_codes, d, device) * scale).to(dtype)


def formula(x, codebook, temperature=1.0, mask=None):
    """The same in plain PyTorch, in the dtype of codebook."""
    vectors = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
    logits = -(vectors.to(codebook.dtype)[:, None] - codebook).square().sum(2) / temperature
    p = logits.softmax(1)
    means = p.mean(0) if len(p) else p.sum(0)
    per_sample = -(p * logits.log_softmax(1)).sum(1)
    return per_sample.mean() if len(p) else per_sample.sum(), entropy(means), means


def run(function, inputs, weights, **options):
    """Outputs, and the gradients of x and codebook of a weighted sum of the outputs."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = function(*leaves, **options)
    loss = 3 * out[0] - 2 * out[1] + (out[2] * weights.to(out[2].dtype)).sum()
    return *(each.detach() for each in out), *torch.autograd.grad(loss, leaves)


def assert_like_float64(inputs, floor=None, **options):
    """The error is at most twice that of the formula in the widest dtype of the inputs."""
    x, codebook = inputs
    weights = torch.randn(len(codebook), device=x.device)
    actual = run(code_entropy, inputs, weights, **options)
    exact, expression = (
        run(formula, [each.to(dtype) for each in inputs], weights, **options)
        for dtype in (torch.float64, torch.promote_types(codebook.dtype, torch.float32))
    )
    assert actual[2].dtype == torch.promote_types(x.dtype, torch.float32)
    assert [each.dtype for each in actual[3:]] == [x.dtype, codebook.dtype]
    # A difference of products has a larger error than one of differences.
    for i, each in enumerate(zip(actual, exact, expression, strict=True)):
        assert_accurate(*each, floor=floor or (4e-3 if i > 2 and x.dtype in HALVES else 2e-5))


@pytest.mark.small
@pytest.mark.every_isa
def test_code_entropy_two_codes_by_hand(device):
    x = torch.tensor([[0.0], [0.5], [1.0]], device=device)
    codebook = torch.tensor([[0.0], [1.0]], device=device)
    out = code_entropy(x, codebook, temperature=1 / torch.log(torch.tensor(3.0)).item())
    # p = (3/4, 1/4), (1/2, 1/2), (1/4, 3/4)
    first = 2 * torch.log(torch.tensor(2.0)) - 0.75 * torch.log(torch.tensor(3.0))
    torch.testing.assert_close(out.per_sample.cpu(), (2 * first + torch.log(torch.tensor(2.0))) / 3)
    torch.testing.assert_close(out.mean_probabilities.cpu(), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(out.batch.cpu(), torch.log(torch.tensor(2.0)))


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_code_entropy_any_size_and_dtype_equals_float64(device, size, dtype):
    inputs = case(*size, device, dtype)
    assert_like_float64(inputs)


@pytest.mark.every_isa
@pytest.mark.parametrize("temperature", [0.01, 0.2, 30.0])
def test_code_entropy_any_temperature_equals_float64(device, temperature):
    assert_like_float64(case(20, 40, 9, device), floor=1e-4 if temperature < 0.1 else None, temperature=temperature)


def test_code_entropy_several_tiles_and_chunks_equal_float64(device, monkeypatch):
    if forced_backend() == "native":
        # Chunks of 512 codes, blocks of at most 128 vectors, superblocks of 256 vectors for this number of codes.
        inputs = case(600, 8300, 20, device)
    elif forced_backend() == "emulated":
        inputs = case(300, 1200, 40, device)
    else:
        module, name, few = {
            "triton": ("triton.architectures", "wanted_programs", lambda: 1),
            "reference": ("reference.code_entropy", "_CHUNK_ELEMENTS", 3 * 130),
        }[forced_backend()]
        monkeypatch.setattr(importlib.import_module(f"dlvae_kernels.backends.{module}"), name, few)
        inputs = case(70, 130, 140, device)
    assert_like_float64(inputs)


@pytest.mark.every_isa
def test_code_entropy_masked_vectors_do_not_count(device):
    x, codebook = case(30, 40, 9, device)
    x, mask = x.view(5, 6, 9), torch.rand(5, 6, device=device) < 0.6
    assert_like_float64((x, codebook), mask=mask)
    # Nor does what they hold.
    expected = run(code_entropy, (x, codebook), codebook[:, 0], mask=mask)
    found = run(code_entropy, (x.masked_fill(~mask[..., None], torch.nan), codebook), codebook[:, 0], mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[3][~mask].any()
    none = run(code_entropy, (x, codebook), codebook[:, 0], mask=torch.zeros_like(mask))
    assert not any(each.any() for each in none)


@pytest.mark.parametrize("dtype", HALVES)
def test_code_entropy_half_precision_beside_float32_equals_float64(device, dtype):
    x, codebook = case(15, 40, 9, device)
    assert_like_float64((x.to(dtype), codebook))


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", layouts(2, 2, torch.device("cpu")))
def test_code_entropy_any_strides_equal_float64(device, layout):
    x = layouts(6, 12, device)[layout] / 4
    assert_like_float64((x, torch.randn(12, 24, device=device).T / 4))


@pytest.mark.float64
@pytest.mark.parametrize("masked", [True, False])
def test_code_entropy_gradcheck_passes(device, masked):
    leaves = [each.requires_grad_() for each in case(5, 6, 3, device, torch.float64)]
    mask = torch.tensor([True, False, True, True, False]) if masked else None
    assert torch.autograd.gradcheck(lambda x, c: code_entropy(x, c, temperature=0.7, mask=mask), leaves)


@pytest.mark.every_isa
def test_code_entropy_gradients_are_only_those_needed(device):
    x, codebook = case(9, 7, 3, device)
    entropies, sums, means = torch.ops.dlvae.code_entropy_fwd(x, codebook, 1.0, None)
    saved = entropies, means, x, codebook, sums, entropies, 1.0, None
    whole = torch.ops.dlvae.code_entropy_bwd(*saved, True, True)
    for needs in ((True, False), (False, True)):
        for need, given, expected in zip(needs, torch.ops.dlvae.code_entropy_bwd(*saved, *needs), whole, strict=True):
            assert torch.equal(given, expected) if need else given.numel() == 0


@pytest.mark.every_isa
def test_code_entropy_huge_distances_are_finite(device):
    """All probabilities but one underflow, of some codes those of all vectors."""
    x, codebook = case(9, 40, 8, device)
    found = run(code_entropy, (x, codebook + 1e3 * torch.arange(40, device=device)[:, None]), torch.ones(40))
    assert all(each.isfinite().all() for each in found)
    assert abs(float(found[0])) < 1e-6
    assert abs(float(found[1])) < 1e-6
    assert found[2].tolist() == [1.0] + 39 * [0.0]
    found = run(code_entropy, (x * 1e4, codebook * 1e4), torch.ones(40))
    assert all(each.isfinite().all() for each in found)


@pytest.mark.every_isa
def test_code_entropy_nan_makes_its_vector_and_the_means_nan(device):
    x, codebook = case(9, 40, 8, device)
    expected = torch.ops.dlvae.code_entropy_fwd(x, codebook, 1.0, None)[0]
    x[3, 2] = torch.nan
    entropies, _, means = torch.ops.dlvae.code_entropy_fwd(x, codebook, 1.0, None)
    assert entropies[3].isnan()
    assert means.isnan().all()
    assert torch.equal(entropies[4:], expected[4:])


@pytest.mark.large
def test_code_entropy_repeated_call_is_bitwise_reproducible(device):
    torch.use_deterministic_algorithms(False)
    inputs = case(3000, 300, 16, device)
    first, second = (run(code_entropy, inputs, torch.ones(300, device=device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_code_entropy_autocast_rounds_nothing(device):
    inputs = case(9, 30, 16, device)
    expected = run(code_entropy, inputs, torch.ones(30, device=device))
    with torch.autocast(device.type, torch.bfloat16):
        actual = run(code_entropy, inputs, torch.ones(30, device=device))
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


def test_code_entropy_n_by_k_matrix_is_never_materialised(device):
    is_interpreted = device.type == "cpu" and forced_backend() == "triton"
    n, num_codes = (128, 512) if is_interpreted else (4096, 4096)
    inputs = case(n, num_codes, 4, device)
    with _Largest() as largest:
        run(code_entropy, inputs, torch.ones(num_codes, device=device))
    assert 0 < largest.bytes <= 4 * n * num_codes // 2


def test_code_entropy_opcheck_and_compile_pass(device):
    x, codebook = case(6, 5, 3, device)
    mask = torch.tensor([True, False, True, True, True, False], device=device)
    for each in (mask, None):
        entropies, sums, means = torch.ops.dlvae.code_entropy_fwd(x, codebook, 0.5, each)
        torch.library.opcheck(torch.ops.dlvae.code_entropy_fwd, (x, codebook, 0.5, each))
        saved = entropies, means, x, codebook, sums, entropies, 0.5, each
        torch.library.opcheck(torch.ops.dlvae.code_entropy_bwd, (*saved, True, each is None))
    compiled = torch.compile(code_entropy, fullgraph=True, backend="aot_eager")
    for each in (mask, None):
        outs = [run(function, (x, codebook), means, mask=each) for function in (compiled, code_entropy)]
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 4)}, r"expected x of shape \[..., 3\], with the D of codebook, got \(2, 4\)"),
        ({"codebook": torch.ones(4, 3).double()}, r"expected codebook of dtype .*, got torch.float64"),
        ({"codebook": torch.ones(0, 3)}, r"expected codebook of shape \[K, D\].*, got \(0, 3\)"),
        ({"temperature": 0}, "expected temperature to be above 0, got 0"),
        ({"temperature": float("nan")}, "expected temperature to be above 0, got nan"),
        ({"mask": torch.ones(3).bool()}, r"expected mask of shape \(2,\) and dtype torch.bool, got \(3,\)"),
        ({"mask": torch.ones(2)}, r"expected mask of shape .* and torch.float32"),
    ],
)
def test_code_entropy_bad_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        code_entropy(**{"x": torch.ones(2, 3), "codebook": torch.ones(4, 3), **changes})

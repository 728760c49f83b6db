"""The C++ operations that sum, gather and scatter: exact where their inputs are small integers, on each
instruction set that this machine has, at any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dlvae_kernels.backends import native, reference

from ..functional.cases import HALVES, layouts

CPU = torch.device("cpu")
SUMS = ("one_hot", "gather_codes_bwd", "vector_quantize_bwd", "ema_statistics", "ema_step", "sparse_decode_bwd")
pytestmark = pytest.mark.skipif(
    any(native.unavailable_reason(op) for op in SUMS),
    reason=next((why for op in SUMS if (why := native.unavailable_reason(op))), ""),
)
# Below, at and above the vectors and blocks of vectors of every instruction set.
FEATURES = (1, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 100, 127, 128, 130, 255, 256, 257, 300, 769)


@pytest.fixture(params=["portable", "avx2", "avx512", "vnni"], autouse=True)
def _cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLVAE_CPU", request.param)
    try:
        assert torch.ops.dlvae_native.cpu_name() == request.param
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def threads() -> Iterator[tuple[int, ...]]:
    before = torch.get_num_threads()
    yield 1, 2, 3, 7
    torch.set_num_threads(before)


def whole(*shape: int) -> Tensor:
    """Numbers whose sums and products are exact in float32, whatever their order."""
    return torch.randint(-8, 9, shape).float()


def sums(rows: Tensor, codes: Tensor, num_codes: int, weights: Tensor | None = None) -> Tensor:
    """[K, D] of rows [N, D] with codes and weights [N, k], in float64."""
    dense = torch.zeros(len(rows), num_codes, dtype=torch.float64)
    weights = torch.ones(codes.shape) if weights is None else weights
    return dense.scatter_add_(1, codes, weights.double()).T @ rows.double()


@pytest.mark.parametrize("d", FEATURES)
def test_sums_any_number_of_features_are_exact(d):
    rows, codes, weights = whole(90, d), torch.randint(0, 13, (90, 21)), whole(90, 21)
    atoms = whole(13, d)
    exact = sums(rows, codes[:, :1], 13)
    assert torch.equal(native.gather_codes_bwd(rows, codes[:, 0], 13, 1).double(), exact)
    assert torch.equal(native.ema_statistics(rows, codes[:, 0], 13, 1)[:, :-1].double(), exact)
    out = native.sparse_decode_fwd(weights, codes, atoms)
    assert torch.equal(out, (weights[..., None] * atoms[codes]).sum(1))
    grad_values, grad_atoms = native.sparse_decode_bwd(rows, weights, codes, atoms, True, True)
    assert torch.equal(grad_values, (rows[:, None] * atoms[codes]).sum(2))
    assert torch.equal(grad_atoms.double(), sums(rows, codes, 13, weights))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 100])
def test_sparse_decode_any_number_of_atoms_is_exact(k):
    rows, codes, weights, atoms = whole(40, 20), torch.randint(0, 30, (40, k)), whole(40, k), whole(30, 20)
    assert torch.equal(native.sparse_decode_fwd(weights, codes, atoms), (weights[..., None] * atoms[codes]).sum(1))
    grad_values, grad_atoms = native.sparse_decode_bwd(rows, weights, codes, atoms, True, True)
    assert torch.equal(grad_values, (rows[:, None] * atoms[codes]).sum(2))
    assert torch.equal(grad_atoms.double(), sums(rows, codes, 30, weights))


# A block has 512 KiB of rows that are read k times: 512 with these features.
@pytest.mark.parametrize("n", [511, 512, 513, 1024, 1700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_atoms_that_span_blocks_are_exact(n, dtype):
    rows, codes, weights = whole(n, 256).to(dtype), torch.randint(0, 5, (n, 3)), whole(n, 3)
    codes[: n // 2, :2] = 4
    _, grad = native.sparse_decode_bwd(rows, weights.to(dtype), codes, whole(5, 256).to(dtype), False, True)
    assert torch.equal(grad.double(), sums(rows, codes, 5, weights))


# Rows that need a copy, 8 MiB at a time: 16384 with these features.
@pytest.mark.parametrize("n", [16383, 16384, 16385, 33000])
def test_sums_codes_that_span_copies_are_exact(n):
    codes = torch.randint(0, 3, (n,))
    for rows in (whole(n, 128).half(), whole(128, n).T, whole(128, n).bfloat16().T):
        assert torch.equal(native.gather_codes_bwd(rows, codes, 3, 1).double(), sums(rows, codes[:, None], 3))


def test_sums_rows_copied_in_blocks_equal_those_in_place():
    """Codes with several chains of additions, that go on from one block of copied rows to the next."""
    x, codes = torch.randn(20_000, 256).bfloat16(), torch.randint(0, 60, (20_000,)) ** 2
    expected = native.ema_statistics(x.float(), codes, 3600, 1)
    for rows in (x, x.float().T.contiguous().T):
        assert torch.equal(native.ema_statistics(rows, codes, 3600, 1), expected)


# A block has 4 MiB of residuals: 4096 with these features.
@pytest.mark.parametrize("n", [4095, 4096, 4097, 9000])
def test_residual_sums_codes_that_span_blocks_are_exact(n):
    x, codebooks, codes = whole(n, 256).bfloat16(), whole(2, 9, 256), torch.randint(-1, 9, (n, 2))
    left = x.float()
    found = native.residual_statistics(x, codes, codebooks)
    losses = torch.full((2,), n * 128.0)  # the gradient of an error is then the error itself
    _, grad = native.residual_quantize_bwd(x, losses, losses, x, codes, codebooks, "once", False, True)
    for level in range(2):
        has_code = codes[:, level] >= 0
        chosen = codes[has_code, level, None]
        assert torch.equal(found[level, :, :-1].double(), sums(left[has_code], chosen, 9))
        assert torch.equal(found[level, :, -1], torch.bincount(chosen[:, 0], minlength=9).float())
        left[has_code] -= codebooks[level][chosen[:, 0]]
        assert torch.equal(grad[level].double(), -sums(left[has_code], chosen, 9))


def test_sums_rows_visited_in_blocks_equal_those_in_one_pass():
    """A block has 512 rows with these features, and a row is of three codes."""
    x, codes = torch.randn(2000, 256), torch.randint(0, 40, (2000, 3)) ** 2
    _, in_blocks = native.sparse_decode_bwd(x, torch.ones(codes.shape), codes, x[:1600], False, True)
    assert torch.equal(in_blocks, native.gather_codes_bwd(x.repeat_interleave(3, 0), codes.flatten(), 1600, 1))


@pytest.mark.parametrize("num_codes", [1, 2, 40, 70_000])
@pytest.mark.parametrize("skew", ["even", "one", "most", "ends"])
def test_sums_any_number_of_threads_are_bitwise_reproducible(threads, num_codes, skew):
    torch.use_deterministic_algorithms(False)  # which would make each empty tensor slow
    n, d, k = 6000, 70, 3
    codes = torch.randint(0, num_codes, (n, k))
    if skew == "one":
        codes[:] = num_codes // 2
    elif skew == "most":
        codes[n // 10 :] = num_codes - 1
    elif skew == "ends":
        codes = codes % 2 * (num_codes - 1)
    rows, values, first = torch.randn(n, d), torch.randn(n, k), codes[:, 0].contiguous()
    rows[5, 3] = torch.inf
    by_channel = torch.randn(4, d, n // 4).transpose(1, 2)
    atoms, one = torch.randn(num_codes, d), torch.full((), 0.7)
    results = []
    for count in threads:
        torch.set_num_threads(count)
        results.append(
            [
                native.gather_codes_bwd(rows, first, num_codes, 1),
                native.gather_codes_bwd(by_channel, first.view(4, -1), num_codes, 1),
                native.gather_codes_bwd(rows.half(), first, num_codes, 1),
                native.ema_statistics(rows, first, num_codes, 1),
                native.sparse_decode_fwd(values, codes, atoms),
                *native.sparse_decode_bwd(rows, values, codes, atoms, True, True),
                *native.vector_quantize_bwd(
                    by_channel, one, one, by_channel + 1, first.view(4, -1), num_codes, 1, True, True
                ),
            ]
        )
        state = atoms.clone(), torch.linspace(0.1, 1, num_codes), atoms.clone()
        native.ema_step(*state, results[-1][3].nan_to_num(posinf=0, neginf=0), 0.9, 1e-5)
        results[-1] += state
    for other in results[1:]:
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("layout", layouts(2, 2, CPU))
def test_vector_quantize_bwd_any_layout_equals_reference(layout, dtype):
    error = torch.empty_like(layouts(400, 36, CPU, dtype)[layout])
    error.copy_(torch.randn(error.shape))
    indices = torch.randint(0, 9, error.shape[:-1])
    losses = torch.tensor(0.7), torch.tensor(-1.3)
    gradients = {
        "alike": torch.randn_like(error),
        "contiguous": torch.randn(error.shape).to(dtype),
        "expanded": torch.tensor(0.3, dtype=dtype).expand(error.shape),
        "wider": torch.randn(error.shape),
        "reversed": torch.randn(error.shape[::-1]).to(dtype).permute(*range(error.ndim)[::-1]),
    }
    for name, grad in gradients.items():
        for needs in ((True, True), (True, False), (False, True)):
            args = (grad, *losses, error, indices, 9, 1, *needs)
            actual, expected = native.vector_quantize_bwd(*args), reference.vector_quantize_bwd(*args)
            for a, b in zip(actual, expected, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), name
                torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_vector_quantize_bwd_without_loss_gradient_passes_gradient_through():
    grad, error, zero = torch.randn(30, 5), torch.randn(30, 5), torch.zeros(())
    grad_x, grad_codebook = native.vector_quantize_bwd(grad, zero, zero, error, torch.arange(30), 30, 1, True, True)
    assert torch.equal(grad_x, grad)
    assert not grad_codebook.any()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_sparse_decode_few_pairs_of_many_atoms_is_exact(dtype):
    values, codes = whole(3, 2), torch.tensor([[0, 4999], [7, 7], [123, 0]])
    for atoms in (whole(5000, 20).to(dtype), whole(20, 5000).to(dtype).T, whole(5000, 40).to(dtype)[:, ::2]):
        out = native.sparse_decode_fwd(values, codes, atoms)
        assert torch.equal(out, (values[..., None] * atoms[codes].float()).sum(1))
        rows = whole(3, 20)
        grads = native.sparse_decode_bwd(rows, values, codes, atoms, True, True)
        assert torch.equal(grads[0], (rows[:, None] * atoms[codes].float()).sum(2))
        assert torch.equal(grads[1].double(), sums(rows, codes, 5000, values))
        assert torch.equal(native.gather_codes_fwd(atoms, codes), atoms[codes])


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_ema_step_any_strides_equals_contiguous(decay, dtype):
    def state():
        torch.manual_seed(3)
        wide = torch.randn(37, 80)
        return wide[:, ::2], torch.rand(37, 2)[:, 1], torch.randn(40, 37).T

    statistics = whole(41, 37).abs().to(dtype).T * (torch.arange(37) % 3 > 0)[:, None]
    actual, expected = state(), state()
    native.ema_step(*actual, statistics, decay, 1e-5)
    reference.ema_step(*expected, statistics, decay, 1e-5)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    stays = statistics[:, -1] == 0
    assert torch.equal(actual[0][stays], state()[0][stays])


def test_ema_statistics_overflowing_sum_counts_finite_rows():
    x = torch.tensor([[3e38, 1.0], [3e38, 2.0], [1.0, torch.nan], [5.0, 6.0]])
    statistics = native.ema_statistics(x, torch.tensor([0, 0, 1, 1]), 3, 1)
    assert statistics.tolist() == [[torch.inf, 3, 2], [5, 6, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        *HALVES,
        torch.float64,
        torch.complex64,
        torch.complex128,
    ],
)
def test_one_hot_any_dtype_equals_torch(dtype):
    indices = torch.randint(0, 70, (300, 3))
    actual = native.one_hot(indices, 70, dtype)
    assert torch.equal(actual, reference.one_hot(indices, 70, dtype))
    assert torch.equal(native.one_hot(indices[:, 1], 70, dtype), reference.one_hot(indices[:, 1], 70, dtype))


@pytest.mark.parametrize("bad", [-2, -1, 9, 2**40, -(2**63), 2**63 - 1])
def test_indices_out_of_range_raise(bad):
    rows, values, atoms = whole(400, 6), whole(400, 2), whole(9, 6)
    codes = torch.zeros(400, 2, dtype=torch.int64)
    codes[399, 1] = bad
    last, one = codes[:, 1], torch.ones(())
    calls = {
        "one_hot": (codes, 9, torch.float32),
        "gather_codes_fwd": (atoms, codes),
        "gather_codes_bwd": (rows, last, 9, 1),
        "ema_statistics": (rows, last, 9, 1),
        "vector_quantize_bwd": (rows, one, one, rows, last, 9, 1, True, True),
        "sparse_decode_fwd": (values, codes, atoms),
        "sparse_decode_bwd": (rows, values, codes, atoms, True, False),
    }
    for op, args in calls.items():
        is_strict = op.startswith("sparse_decode")
        if bad == -1 and not is_strict:
            continue
        bounds = r"\[0, 9\)" if is_strict else r"\[-1, 9\) \(-1 stands for no code\)"
        with pytest.raises(RuntimeError, match=f"expected indices in {bounds}, got {bad}"):
            getattr(native, op)(*args)
    with pytest.raises(RuntimeError, match=f"expected indices in .*, got {bad}"):
        native.sparse_decode_bwd(rows, values, codes, atoms, False, True)
    with pytest.raises(RuntimeError, match=f"expected indices in .*, got {bad}"):
        native.sparse_decode_fwd(values[-1:], codes[-1:], atoms.half())


@pytest.mark.parametrize("bad", [-2, 9, 2**40])
def test_residual_indices_out_of_range_raise(bad):
    rows, codebooks, losses = whole(400, 6), whole(2, 9, 6), torch.ones(2)
    codes = torch.full((400, 2), -1)
    codes[399, 1] = bad
    backward = rows, losses, losses, rows, codes, codebooks, "once"
    for op, args in (
        ("residual_statistics", (rows, codes, codebooks)),
        ("residual_quantize_bwd", (*backward, True, False)),
        ("residual_quantize_bwd", (*backward, False, True)),
    ):
        with pytest.raises(RuntimeError, match=rf"expected indices in \[-1, 9\).*, got {bad}"):
            getattr(native, op)(*args)


def test_operations_invalid_arguments_raise_named_errors():
    rows, codes = whole(5, 3), torch.zeros(5, dtype=torch.int64)
    cases = [
        ("gather_codes_bwd", (rows, codes[:4], 2, 1), "expected one index for each of the 5 vectors of grad, got 4"),
        ("gather_codes_bwd", (rows, codes, 0, 1), "expected num_codes to be at least 1, got 0"),
        (
            "gather_codes_bwd",
            (rows, codes, 2, 3),
            "expected num_heads to be at least 1 and to divide the 5 vectors, got 3",
        ),
        ("gather_codes_fwd", (rows[None], codes), r"expected indices of shape \[..., H\] for codebook .*, got \[5\]"),
        (
            "nearest_code",
            (rows, rows[None], False, "float32"),
            r"expected x of shape \[..., H, D\] with H >= 1 for codebook \[1, 5, 3\], got \[5, 3\]",
        ),
        (
            "vector_quantize_fwd",
            (rows, rows, False, "float32", codes),
            r"expected mask of shape \[5\] and dtype bool, got \[5\] and Long",
        ),
        ("ema_statistics", (rows, codes.int(), 2, 1), "expected indices of dtype int64, got Int"),
        (
            "ema_step",
            (rows, rows[:, 0], rows, rows, 0.9, 0.0),
            r"expected statistics of shape .*= \[5, 4\], got \[5, 3\]",
        ),
        (
            "ema_step",
            (rows[:1].expand(5, 3), rows[:, 0], rows, whole(5, 4), 0.9, 0.0),
            "expected codebook with memory .* expanded",
        ),
        ("sparse_decode_fwd", (rows, codes[:, None], rows), "expected values and indices of one shape"),
        (
            "sparse_decode_bwd",
            (rows, rows, codes[:, None].expand(5, 3), whole(4, 2), True, True),
            "expected grad of shape",
        ),
        (
            "vector_quantize_bwd",
            (rows[:2], rows, rows, rows, codes, 2, 1, True, False),
            "expected grad_quantized of the shape",
        ),
        (
            "vector_quantize_bwd",
            (rows, rows, rows, rows, codes, 2, 1, False, True),
            r"expected grad_codebook_loss to be one number, got shape \[5, 3\]",
        ),
        ("residual_statistics", (rows, codes, whole(2, 4, 3)), r"expected indices of shape \[..., L\] .*, got \[5\]"),
        ("residual_statistics", (rows, codes, whole(2, 4, 2)), "expected x of D = 2 features as in codebooks, got 3"),
        (
            "residual_quantize_fwd",
            (rows, whole(2, 4, 3), torch.ones(3, dtype=torch.bool), None, "float32", "once"),
            r"expected levels of shape \[2\] and dtype bool, got \[3\] and Bool",
        ),
        (
            "residual_quantize_bwd",
            (rows, rows[0], rows[0, :1], rows, codes[:, None], whole(1, 4, 3), "once", True, True),
            r"expected grad_codebook_loss of shape \[L\], got \[3\]",
        ),
    ]
    for op, args, message in cases:
        with pytest.raises(RuntimeError, match=message):
            getattr(native, op)(*args)

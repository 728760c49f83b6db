"""The compiled search: rounded first scores, and the exact comparison of codes that rounding may have reordered."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from dlvae_kernels import nearest_code, use_backend, vector_quantize
from dlvae_kernels.backends import native, reference
from dlvae_kernels.testing import exact_distances

from . import hard_data
from .speed import slowdown, subnormal_penalty

pytestmark = pytest.mark.skipif(
    native.library_unavailable_reason() is not None, reason=str(native.library_unavailable_reason())
)


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("DLVAE_CPU", request.param)
    with use_backend("native"):
        yield request.param


def uncertain(x, codebook):
    return torch.ops.dlvae_native.uncertain_rows(x, codebook)


@pytest.mark.parametrize(("k", "d"), [(512, 64), (3000, 8), (70, 300)])
def test_nearest_code_near_ties_are_searched_again_and_equal_float64(instruction_set, k, d):
    # Each code has a neighbour that is farther off by less than any of the arithmetics can tell.
    codebook = torch.randn(k, d).repeat_interleave(2, 0)
    codebook[1::2, 0] += 1e-6
    x = torch.randn(400, d)
    assert uncertain(x, codebook) == 400
    distances = exact_distances(x, codebook)
    assert torch.equal(nearest_code(x, codebook), distances.argmin(1))


def test_nearest_code_random_rows_few_are_searched_again(instruction_set):
    x, codebook = torch.randn(4096, 64), torch.randn(512, 64)
    assert uncertain(x, codebook) < 0.05 * len(x)
    assert uncertain(codebook, codebook) == 0


@pytest.mark.parametrize("k", [1, 31, 32, 33, 257, 1025, 6000])
@pytest.mark.parametrize("n", [1, 7, 8, 33, 63, 64, 65])
def test_nearest_code_sizes_around_block_edges_equals_float64(instruction_set, n, k):
    for d in (1, 2, 15, 17):
        x, codebook = torch.randn(n, d), torch.randn(k, d)
        expected, exact = reference.nearest_code(x, codebook, True, "float32")
        indices, distances = nearest_code(x, codebook, return_distance=True)
        assert torch.equal(indices, expected)
        torch.testing.assert_close(distances, exact, rtol=1e-6, atol=0)


def test_nearest_code_one_outlier_row_leaves_other_rows_exact(instruction_set):
    x, codebook = torch.randn(200, 16), torch.randn(300, 16)
    x[5] *= 1e6
    x[70, 3] = 3e38
    x[150] *= 1e-30
    assert torch.equal(nearest_code(x, codebook), reference.nearest_code(x, codebook, False, "float32")[0])


def test_nearest_code_features_beyond_int16_sums_equals_float64(instruction_set):
    x, codebook = torch.randn(9, 9000), torch.randn(40, 9000)
    assert torch.equal(nearest_code(x, codebook), exact_distances(x, codebook).argmin(1))


# Most rows are ambiguous in fact: their distances from two codes differ by less than float32 tells.
AMBIGUOUS = {"integers"}


@pytest.mark.parametrize("size", [(70, 300, 24), (100, 1500, 3), (20, 40, 700)])
@pytest.mark.parametrize("name", hard_data.CASES)
def test_nearest_code_hard_data_equals_float64(instruction_set, name, size):
    x, codebook = hard_data.draw(name, *size)
    distances = exact_distances(x, codebook)
    expected = torch.zeros(len(x)).long() if name == "infinite_rows" else distances.argmin(1)
    assert torch.equal(nearest_code(x, codebook), expected)
    assert torch.equal(vector_quantize(x, codebook).indices, expected)
    # Few rows take another way.
    assert torch.equal(nearest_code(x[:5], codebook), expected[:5])


@pytest.mark.parametrize("name", sorted(hard_data.CASES.keys() - AMBIGUOUS))
def test_nearest_code_hard_data_leaves_few_uncertain_rows(instruction_set, name):
    x, codebook = hard_data.draw(name, 1000, 512, 64)
    assert uncertain(x, codebook) < 0.1 * len(x)


@pytest.mark.parametrize("k", [70, 512])
def test_nearest_code_repeated_codes_takes_the_first(instruction_set, k):
    # Codes of one length, with hashes that differ in a few bits alone.
    codebook = torch.randn(k, 12).sign()
    x = torch.randn(300, 12)
    indices = nearest_code(x, codebook)
    assert torch.equal(indices, exact_distances(x, codebook).argmin(1))
    assert all((codebook[:i] == codebook[i]).all(1).sum() == 0 for i in indices.unique().tolist())


@pytest.mark.parametrize("n", [3, 40])
def test_nearest_code_infinite_row_takes_the_first_code_without_nan(instruction_set, n):
    codebook = torch.randn(50, 4)
    codebook[0, 1], codebook[1, 2] = torch.nan, torch.inf
    x = torch.randn(n, 4)
    x[::2, 3] = torch.inf
    x[1] = torch.nan
    indices = nearest_code(x, codebook)
    assert (indices[::2] == 1).all()
    assert indices[1] == 0
    assert (nearest_code(torch.randn(n, 4), torch.full((9, 4), torch.nan)) == 0).all()


@pytest.mark.parametrize("d", [1, 5, 16, 33])
@pytest.mark.parametrize("k", [1, 3, 50, 3001])
def test_nearest_code_few_rows_equals_float64_with_any_number_of_threads(instruction_set, k, d):
    codebook = torch.randn(k, d)
    codebook[k // 2 :: 7] = codebook[0].clone()
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 4, 7, 16, 17):
            x = torch.randn(n, d)
            x[n // 2] = codebook[-1]
            distances = exact_distances(x, codebook)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                indices, found = nearest_code(x, codebook, return_distance=True)
                assert torch.equal(indices, distances.argmin(1))
                torch.testing.assert_close(found, distances.amin(1).float(), rtol=1e-6, atol=0)
    finally:
        torch.set_num_threads(before)


def resident(field: str) -> float:
    """A memory field of this process in MB."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(f"{field}:") + 1]) / 1e3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_nearest_code_few_rows_copies_no_codebook():
    x, codebook = torch.randn(4, 256), torch.randn(65536, 256)  # 67 MB
    nearest_code(x, codebook)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = resident("VmRSS")
    nearest_code(x, codebook)
    assert resident("VmHWM") - before < 30


@pytest.mark.slow
@pytest.mark.parametrize("size", [(4096, 512, 64), (4096, 2048, 8)])
@pytest.mark.parametrize("name", hard_data.CASES)
def test_nearest_code_hard_data_is_at_most_four_times_slower(instruction_set, name, size):
    if name == "subnormal_rows" and subnormal_penalty() > 2:
        pytest.skip("this processor computes with subnormal numbers slowly")
    x, codebook = torch.randn(*size[::2]), torch.randn(*size[1:])
    hard = hard_data.draw(name, *size)
    assert slowdown(lambda: nearest_code(*hard), lambda: nearest_code(x, codebook), 4) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 8, 16])
def test_nearest_code_few_rows_is_not_slower_than_plain_torch(n):
    x, codebook = torch.randn(n, 64), torch.randn(8192, 64)
    plain = lambda: (codebook.square().sum(1) - 2 * x @ codebook.T).argmin(1)  # noqa: E731
    with use_backend("native"):
        assert slowdown(lambda: nearest_code(x, codebook), plain, 1) <= 1


def test_nearest_code_any_number_of_threads_is_bitwise_reproducible(instruction_set):
    x, codebook = torch.randn(8, 24, 31, 7), torch.randn(700, 24)
    rows = x.flatten(2).transpose(1, 2).requires_grad_()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = vector_quantize(rows, codebook)
            (grad,) = torch.autograd.grad(out.commitment_loss, rows)
            found.append((*out, grad, *nearest_code(rows, codebook, return_distance=True)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_nearest_code_invalid_arguments_raise_named_errors():
    with pytest.raises(RuntimeError, match="expected x of D = 2 features as in codebook, got 3"):
        torch.ops.dlvae_native.nearest_code(torch.zeros(2, 3), torch.zeros(4, 2), False, "float32")
    with pytest.raises(RuntimeError, match=r"expected codebook of shape \[K, D\] .*, got \[0, 3\]"):
        torch.ops.dlvae_native.nearest_code(torch.zeros(2, 3), torch.zeros(0, 3), False, "float32")
    with pytest.raises(RuntimeError, match="expected x of dtype float32, bfloat16 or float16, got Double"):
        torch.ops.dlvae_native.nearest_code(torch.zeros(2, 3).double(), torch.zeros(4, 3), False, "float32")

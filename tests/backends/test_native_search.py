"""What only the compiled search has: arithmetics that round, and a second look where that might hide the nearest."""

from __future__ import annotations

import pytest
import torch

from dlvae_kernels import nearest_code, use_backend, vector_quantize
from dlvae_kernels.backends import native, reference
from dlvae_kernels.testing import exact_distances

pytestmark = pytest.mark.skipif(native.why_not_loaded() is not None, reason=str(native.why_not_loaded()))


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("DLVAE_CPU", request.param)
    with use_backend("native"):
        yield request.param


def uncertain(x, codebook):
    return torch.ops.dlvae_native.uncertain_rows(x, codebook)


@pytest.mark.parametrize(("k", "d"), [(512, 64), (3000, 8), (70, 300)])
def test_rows_that_rounding_might_decide_are_searched_again_and_come_out_right(instruction_set, k, d):
    # Each code has a neighbour that is farther off by less than any of the arithmetics can tell.
    codebook = torch.randn(k, d).repeat_interleave(2, 0)
    codebook[1::2, 0] += 1e-6
    x = torch.randn(400, d)
    assert uncertain(x, codebook) == 400
    distances = exact_distances(x, codebook)
    assert torch.equal(nearest_code(x, codebook), distances.argmin(1))


def test_few_rows_are_searched_again(instruction_set):
    x, codebook = torch.randn(4096, 64), torch.randn(512, 64)
    assert uncertain(x, codebook) < 0.05 * len(x)
    assert uncertain(codebook, codebook) == 0
    # Equal codes tie for every row that is nearest to them.
    assert uncertain(codebook, codebook.repeat(2, 1)) == len(codebook)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 257, 1025, 6000])
@pytest.mark.parametrize("n", [1, 7, 8, 33, 63, 64, 65])
def test_edges_of_blocks_panels_and_groups(instruction_set, n, k):
    for d in (1, 2, 15, 17):
        x, codebook = torch.randn(n, d), torch.randn(k, d)
        expected, exact = reference.nearest_code(x, codebook, True, "float32")
        indices, distances = nearest_code(x, codebook, return_distance=True)
        assert torch.equal(indices, expected)
        torch.testing.assert_close(distances, exact, rtol=1e-6, atol=0)


def test_one_outlier_row_leaves_the_rows_beside_it_right(instruction_set):
    x, codebook = torch.randn(200, 16), torch.randn(300, 16)
    x[5] *= 1e6
    x[70, 3] = 3e38
    x[150] *= 1e-30
    assert torch.equal(nearest_code(x, codebook), reference.nearest_code(x, codebook, False, "float32")[0])


def test_rows_longer_than_integers_can_sum(instruction_set):
    x, codebook = torch.randn(9, 9000), torch.randn(40, 9000)
    assert torch.equal(nearest_code(x, codebook), exact_distances(x, codebook).argmin(1))


def test_any_number_of_threads_gives_the_same_bits(instruction_set):
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


def test_errors_name_the_argument():
    with pytest.raises(RuntimeError, match="x has D = 3; it needs that of codebook, 2"):
        torch.ops.dlvae_native.nearest_code(torch.zeros(2, 3), torch.zeros(4, 2), False, "float32")
    with pytest.raises(RuntimeError, match=r"codebook has shape \[0, 3\]; it needs \[K, D\]"):
        torch.ops.dlvae_native.nearest_code(torch.zeros(2, 3), torch.zeros(0, 3), False, "float32")
    with pytest.raises(RuntimeError, match="x has a dtype that is not float32, bfloat16 or float16"):
        torch.ops.dlvae_native.nearest_code(torch.zeros(2, 3).double(), torch.zeros(4, 3), False, "float32")

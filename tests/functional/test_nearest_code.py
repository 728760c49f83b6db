from __future__ import annotations

import pytest
import torch

from dlvae_kernels import nearest_code
from dlvae_kernels.testing import assert_same_codes, exact_distances

from .cases import DTYPES, INTERPRETED, SIZES, layouts, rows

OPS = ("nearest_code",)


@pytest.mark.small
@pytest.mark.every_isa
def test_nearest_code_three_codes_by_hand(device):
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]], device=device)
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [2.0, 0.0], [9.0, 9.0]], device=device)
    indices, distances = nearest_code(x, codebook, return_distance=True)
    # The fourth row lies half way between the first two codes.
    assert indices.tolist() == [0, 1, 2, 0, 1]
    assert distances.tolist() == [1.0, 1.0, 1.0, 4.0, 106.0]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_nearest_code_any_size_and_dtype_equals_float64(device, size, dtype):
    n, k, d = size
    x, codebook = rows(n, d, device, dtype), rows(k, d, device, dtype)
    indices, distances = nearest_code(x, codebook, return_distance=True)
    assert_same_codes(indices, x, codebook)
    assert torch.equal(indices, nearest_code(x, codebook))
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = exact_distances(x, codebook).amin(1) if n else torch.empty(0, device=device)
    torch.testing.assert_close(distances.double(), exact.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.large
def test_nearest_code_vectors_in_several_chunks_match_float64(device):
    x, codebook = rows(5000, 16, device), rows(1500, 16, device)
    assert_same_codes(nearest_code(x, codebook), x, codebook)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", layouts(2, 2, torch.device("cpu")))
def test_nearest_code_any_strides_match_contiguous(device, layout):
    x = layouts(50, 12, device)[layout]
    codebook = rows(24, 40, device)[:, 5:29:2]
    indices = nearest_code(x, codebook)
    assert indices.shape == x.shape[:-1]
    assert torch.equal(indices, nearest_code(x.contiguous(), codebook.contiguous()))
    assert_same_codes(indices, x, codebook)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nearest_code_float32_codebook_beside_half_vectors_matches_float64(device, dtype):
    x, codebook = rows(200, 32, device, dtype), rows(64, 32, device)
    assert_same_codes(nearest_code(x, codebook), x, codebook)


@pytest.mark.every_isa
def test_nearest_code_ties_give_the_lowest_index(device):
    codebook = rows(70, 33, device)
    codebook = torch.cat([codebook, codebook, codebook])
    x = torch.cat([codebook, rows(300, 33, device)])
    expected = torch.arange(210, device=device) % 70
    precisions = ["exact", "float32"]
    if INTERPRETED:
        # The products of NumPy depend on the place of a column, and each row takes long.
        x, expected, precisions = x[::3], expected[::3], ["exact"]
    for precision in precisions:
        indices = nearest_code(x, codebook, precision=precision)
        assert indices.max() < 70
        assert torch.equal(indices[: len(expected)], expected)


@pytest.mark.every_isa
@pytest.mark.parametrize("d", [5, 12])
def test_nearest_code_ties_among_integers_give_the_lowest_index(device, d):
    # Sums of small integers are exact in any order, so nearly every row has exact ties, near and far.
    x, codebook = (torch.randint(-1, 2, (n, d), device=device).float() for n in (150, 300))
    indices, distances = nearest_code(x, codebook, return_distance=True)
    expected, exact = exact_distances(x, codebook).argmin(1), exact_distances(x, codebook).amin(1)
    assert torch.equal(indices, expected)
    assert torch.equal(distances.double(), exact.double())
    assert not nearest_code(x, torch.ones(300, d, device=device)).any()


def test_nearest_code_close_codes_are_separated(device):
    # A clamp of squared distances at 1e-8 would make all of these tie.
    codebook = torch.tensor([[0.5 + 3e-5], [0.5], [0.5 - 3e-5]], device=device)
    x = torch.tensor([[0.5], [0.5 + 2.9e-5], [0.5 - 2.9e-5]], device=device)
    assert nearest_code(x, codebook, precision="exact").tolist() == [1, 0, 2]


def test_nearest_code_far_from_the_origin_matches_float64(device):
    # |x|^2 swallows the differences of float32 scores here.
    codebook = rows(64, 16, device) + 3000
    x = codebook[torch.arange(200, device=device) % 64] + 0.01 * rows(200, 16, device)
    assert nearest_code(x, codebook, precision="exact").tolist() == [i % 64 for i in range(200)]


@pytest.mark.large
def test_nearest_code_differences_that_cancel_in_a_product_match_float64(device):
    x = torch.full((1, 256), 100.0, device=device)
    codebook = x.repeat(2, 1)
    codebook[0, 0] += 2e-3
    index, distance = nearest_code(x, codebook, return_distance=True, precision="exact")
    assert (int(index), float(distance)) == (1, 0)
    close = 1e3 + 1e-3 * rows(2000, 256, device)
    codebook = 1e3 + 1e-3 * rows(50, 256, device)
    indices, distances = nearest_code(close, codebook, return_distance=True, precision="exact")
    exact, expected = exact_distances(close, codebook).min(1)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(distances, exact.float(), rtol=1e-5, atol=0)


def test_nearest_code_outlier_code_leaves_the_others_exact(device):
    codebook = rows(64, 16, device)
    x = rows(300, 16, device)
    expected = nearest_code(x, codebook)
    codebook = torch.cat([codebook, torch.full((1, 16), 1e15, device=device)])
    assert torch.equal(nearest_code(x, codebook, precision="exact"), expected)


def test_nearest_code_long_code_leaves_the_norms_of_others_exact(device):
    codebook = torch.tensor([[1.0], [9.0], [1.02], [9.0], [1e5]], device=device)
    assert nearest_code(torch.tensor([[1.005]], device=device), codebook).tolist() == [0]
    x, codebook = rows(500, 2, device), torch.cat([rows(300, 2, device), torch.full((1, 2), 1e4, device=device)])
    assert_same_codes(nearest_code(x, codebook), x, codebook)


def test_nearest_code_squares_beyond_float32_are_compared(device):
    for scale in (1e19, 1e-24):
        x, codebook = torch.tensor([[4.0]], device=device) * scale, torch.tensor([[-1.0], [1.0]], device=device) * scale
        assert nearest_code(x, codebook).tolist() == [1]


def test_nearest_code_codebook_changed_through_data_is_read_again(device):
    x, codebook = rows(50, 4, device), rows(20, 4, device)
    nearest_code(x, codebook)
    codebook.data.copy_(rows(20, 4, device))
    assert_same_codes(nearest_code(x, codebook), x, codebook)


def test_nearest_code_extreme_scales_match_float64(device):
    for scale in (1e-18, 1e18):
        x, codebook = scale * rows(100, 8, device), scale * rows(32, 8, device)
        assert torch.equal(nearest_code(x, codebook), exact_distances(x / scale, codebook / scale).argmin(1))


@pytest.mark.every_isa
def test_nearest_code_nan_and_infinity_follow_the_rules(device):
    nan, inf = float("nan"), float("inf")
    codebook = torch.tensor([[nan, 0.0], [1.0, 1.0], [2.0, 2.0], [inf, 0.0]], device=device)
    x = torch.tensor([[nan, 1.0], [1.9, 1.9], [inf, 0.0], [-inf, inf], [0.0, 0.0]], device=device)
    indices = nearest_code(x, codebook)
    assert indices[0] == 0
    assert indices[1] == 2
    assert indices[4] == 1
    assert ((indices >= 0) & (indices < 4)).all()
    assert (indices[1:] != 0).all()
    assert nearest_code(x, codebook[:1]).tolist() == [0] * 5
    assert nearest_code(x[1:], codebook[[0, 3]]).tolist() == [1] * 4
    for precision in ("float32", "exact"):
        _, distances = nearest_code(x, codebook, return_distance=True, precision=precision)
        assert distances[0].isnan()


@pytest.mark.large
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_nearest_code_ignores_the_callers_precision(device, precision):
    x, codebook = rows(500, 64, device), rows(300, 64, device)
    expected = nearest_code(x, codebook)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(nearest_code(x, codebook), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.large
def test_nearest_code_repeated_call_is_bitwise_reproducible(device):
    torch.use_deterministic_algorithms(False)
    x, codebook = rows(1000, 32, device), rows(300, 32, device)
    first, second = (nearest_code(x, codebook, return_distance=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_nearest_code_opcheck_passes(device):
    x = layouts(20, 6, device)["channel_first"]
    for return_distance in (False, True):
        torch.library.opcheck(torch.ops.dlvae.nearest_code, (x, rows(5, 6, device), return_distance, "float32"))


def test_nearest_code_compiled_whole_matches_eager(device):
    x, codebook = rows(40, 6, device), rows(9, 6, device)
    compiled = torch.compile(nearest_code, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (40, 17):
        assert torch.equal(compiled(x[:n], codebook), nearest_code(x[:n], codebook))


def test_nearest_code_distances_have_no_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    _, distances = nearest_code(x, torch.randn(5, 3, requires_grad=True), return_distance=True)
    assert not distances.requires_grad


@pytest.mark.parametrize(
    ("x", "codebook", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 2), r"expected x of shape \[..., 2\], with the D of codebook, got \(2, 3\)"),
        (torch.zeros(()), torch.zeros(4, 2), r"expected x of shape .*, got \(\)"),
        (torch.zeros(2, 3), torch.zeros(0, 3), r"expected codebook of shape .*K >= 1.*, got \(0, 3\)"),
        (torch.zeros(2, 3), torch.zeros(3), r"expected codebook of shape \[K, D\].*, got \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(4, 3), r"expected x of dtype .*, got torch.int32"),
        (torch.zeros(2, 3), torch.zeros(4, 3).long(), r"expected codebook of dtype .*, got torch.int64"),
        (torch.zeros(2, 3), torch.zeros(4, 3).half(), r"expected codebook of dtype .*, got torch.float16"),
        (torch.zeros(2, 3).double(), torch.zeros(4, 3), r"expected codebook of dtype .*, got torch.float32"),
        (torch.zeros(2, 3, device="meta"), torch.zeros(4, 3), r"expected x on the device of codebook, cpu, got meta"),
    ],
)
def test_nearest_code_bad_input_raises(x, codebook, message):
    with pytest.raises(ValueError, match=message):
        nearest_code(x, codebook)

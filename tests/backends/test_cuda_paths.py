"""The CUDA kernels in the emulator: any order of threads, and every path that sizes or data choose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlvae_kernels.backends import reference
from dlvae_kernels.testing import assert_accurate, assert_same_topk, exact_distances, exact_products

from .test_native_fuzz import THREADED

# These are the limits of the emulated device, csrc/tests/cuda/device_emulated.cpp.
MULTIPROCESSORS, CHUNK_ELEMENTS = 3, 1 << 15
TILE = 128

ORDERED = {
    **THREADED,
    "topk_codes dot": lambda x, codes, i, w: (x, codes, 8, "dot", codes[:, 0]),
    "one_hot": lambda x, codes, i, w: (i, len(codes), torch.bfloat16),
    "nearest_code heads": lambda x, codes, i, w: (
        x.unflatten(0, (-1, 2)),
        codes.unflatten(0, (2, -1)),
        True,
        "float32",
    ),
    "vector_quantize_fwd heads and mask": lambda x, codes, i, w: (
        *(x.unflatten(0, (-1, 2)), codes.unflatten(0, (2, -1)), True, "float32"),
        i[:, 0].unflatten(0, (-1, 2)) != 7,
    ),
    "ema_statistics heads": lambda x, codes, i, w: (x.unflatten(0, (-1, 2)), i[:, 0].unflatten(0, (-1, 2)), 150, 2),
    "gather_codes_fwd": lambda x, codes, i, w: (codes, i),
    "residual_quantize_fwd": lambda x, codes, i, w: (x, levels_of(codes), None, x[:, 0] > -1, "float32", "once"),
    "residual_quantize_bwd": lambda x, codes, i, w: (
        *(x, w[0, :2], w[1, :2], x, i[:, :2] % 150, levels_of(codes), "rotation_each"),
        *(True, True),
    ),
    "residual_statistics": lambda x, codes, i, w: (x, i[:, :2] % 150, levels_of(codes)),
    # NaN would hide all else.
    "kept_softmax_fwd": lambda x, codes, i, w: (finite(x), finite(codes), None, i),
    "code_entropy_fwd": lambda x, codes, i, w: (finite(x), finite(codes), 9.0, w[:, 0] > 0),
    "code_entropy_bwd": lambda x, codes, i, w: (
        *(w[:, 0].contiguous(), codes[:, 0].contiguous(), finite(x), finite(codes), 1 + w[:, :2].abs()),
        *(w[:, 1].contiguous(), 9.0, None, True, True),
    ),
    "kept_softmax_bwd": lambda x, codes, i, w: (
        *(w, w.sigmoid(), 1 + w[:, :2].abs(), finite(x), finite(codes), None, i),
        *(True, True, True),
    ),
}


def levels_of(codes: Tensor) -> Tensor:
    return codes.view(2, 150, 40)


def finite(values: Tensor) -> Tensor:
    # Its features are not adjacent either.
    return torch.where(values.abs() < 1e6, values, 1).T.contiguous().T


@pytest.mark.parametrize("name", ORDERED)
def test_operations_any_order_of_threads_and_blocks_are_bitwise_reproducible(emulated, monkeypatch, name):
    # The operations that are updated in place come with `ema_step` below.
    # Features of x are not adjacent, those of codes and results are: other lanes load than store.
    x, codes = torch.randn(150, 80)[:, ::2], torch.randn(300, 40)
    # Beyond float16 if any other element sets the scale of the terms.
    codes[253, 7] = 60
    # Rows that are searched again, rows with more ties than a selection has room for, and rows beyond the terms.
    codes[40:200] = codes[40]
    x[60:90] = codes[40]
    x[3, 3], x[4, 4], codes[5, 5], x[6] = math.nan, math.inf, -math.inf, 1e30
    indices = torch.rand(150, 300).argsort(1)[:, :6]
    indices[:130, 0] = 7
    args = ORDERED[name](x, codes, indices, torch.randn(150, 6))

    def run() -> list[bytes]:
        results = getattr(emulated, name.split()[0])(*args)
        return [bits(each) for each in ((results,) if isinstance(results, Tensor) else results)]

    expected = run()
    for seed in "123":
        monkeypatch.setenv("DLVAE_EMULATED_ORDER", seed)
        assert run() == expected, f"another result with DLVAE_EMULATED_ORDER={seed}"


def bits(values: Tensor) -> bytes:
    # A NaN has many, of which none means anything.
    plain = values.masked_fill(values.isnan(), math.nan) if values.is_floating_point() else values
    return plain.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_ema_step_any_order_of_threads_is_bitwise_reproducible(emulated, monkeypatch):
    state, statistics = (torch.randn(70, 9), torch.rand(70), torch.randn(70, 9)), torch.rand(70, 10)

    def run() -> list[Tensor]:
        changed = [each.clone() for each in state]
        emulated.ema_step(*changed, statistics, 0.9, 1e-5)
        return changed

    expected = run()
    for seed in "123":
        monkeypatch.setenv("DLVAE_EMULATED_ORDER", seed)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def nearest(emulated, x: Tensor, codes: Tensor) -> Tensor:
    return emulated.nearest_code(x, codes, False, "float32")[0]


def first_of_nearest(x: Tensor, codes: Tensor) -> Tensor:
    return exact_distances(x, codes).nan_to_num(torch.inf).argmin(1)


@pytest.mark.parametrize("d", [1, 16, 17, 96, 97, 200])
def test_nearest_code_near_ties_are_searched_again(emulated, d):
    codes = torch.randn(300, d).repeat_interleave(2, 0)
    codes[1::2, 0] += 1e-6
    # More than there are blocks.
    x = torch.randn(40, d)
    assert emulated.uncertain_rows(x, codes) == 40 > 4 * MULTIPROCESSORS
    assert torch.equal(nearest(emulated, x, codes), first_of_nearest(x, codes))


def test_nearest_code_random_rows_few_are_searched_again(emulated):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, codes = torch.randn(300, 24).to(dtype), torch.randn(200, 24).to(dtype)
        assert emulated.uncertain_rows(x, codes) < 10
        assert torch.equal(nearest(emulated, x, codes), first_of_nearest(x, codes))


def test_nearest_code_ties_between_partitions_take_the_lowest(emulated):
    # One tile of rows: its four tiles of codes are partitioned between two blocks.
    codes = torch.randn(4 * TILE - 7, 20)
    codes[3 * TILE :] = codes[: TILE - 7]
    x = codes[torch.arange(40) * 12]
    assert torch.equal(nearest(emulated, x, codes), first_of_nearest(x, codes))


@pytest.mark.parametrize("n", [5, 300])
@pytest.mark.parametrize("d", [5, 40])
def test_nearest_code_heads_equal_codebooks_one_by_one(emulated, n, d):
    # No size is a multiple of a tile. Few vectors partition the codes; many are packed in several chunks.
    assert CHUNK_ELEMENTS // (3 * 32) // TILE * TILE < 300
    x, codebook = torch.randn(n, 3, d), torch.randn(3, 2 * TILE - 7, d)
    codebook[1, 1::2] = codebook[1, 0:-1:2] + 1e-6
    codebook[2, 5], codebook[2, 7, 0], x[1, 2, 0], x[2, 1, 0] = math.nan, math.inf, math.nan, -math.inf
    # Each head has its own scale.
    codebook *= torch.tensor([1e-6, 1, 1e6])[:, None, None]
    x *= torch.tensor([1e-6, 1, 1e6])[:, None]
    for vectors, codes in ((x, codebook), (x.transpose(0, 1).clone().transpose(0, 1), codebook.mT.clone().mT)):
        found = emulated.nearest_code(vectors, codes, True, "float32")
        one_by_one = [emulated.nearest_code(x[:, h], codebook[h], True, "float32") for h in range(3)]
        for each, expected in zip(found, zip(*one_by_one, strict=True), strict=True):
            assert bits(each) == bits(torch.stack(expected, 1))
    assert emulated.uncertain_rows(x, codebook) == sum(emulated.uncertain_rows(x[:, h], codebook[h]) for h in range(3))


def test_sums_and_codes_of_heads_equal_codebooks_one_by_one(emulated):
    heads, k, d = 3, 20, 5
    x, codebook = torch.randn(200, heads, d), torch.randn(heads, k, d)
    indices = torch.randint(-1, k, (200, heads))
    for op, args in (("gather_codes_bwd", (x, indices)), ("ema_statistics", (x, indices))):
        sums = getattr(emulated, op)(*args, k, heads)
        expected = [getattr(emulated, op)(*(each[:, h] for each in args), k, 1) for h in range(heads)]
        torch.testing.assert_close(sums, torch.cat(expected), rtol=1e-5, atol=1e-5)
    for codes in (codebook, codebook.mT.clone().mT, codebook.transpose(0, 1).clone().transpose(0, 1)):
        expected = [emulated.gather_codes_fwd(codebook[h], indices[:, h]) for h in range(heads)]
        assert torch.equal(emulated.gather_codes_fwd(codes, indices), torch.stack(expected, 1))
    state = codebook, torch.rand(heads, k), torch.randn(heads, k, d)
    statistics = torch.rand(heads, k, d + 1)
    expected = [[each[h].clone() for each in state] for h in range(heads)]
    emulated.ema_step(*state, statistics, 0.9, 1e-5)
    for h in range(heads):
        emulated.ema_step(*expected[h], statistics[h], 0.9, 1e-5)
        assert all(torch.equal(each[h], like) for each, like in zip(state, expected[h], strict=True))


@pytest.mark.parametrize("heads", [None, 3])
def test_vector_quantize_mask_leaves_vectors_out(emulated, heads):
    shape = (70,) if heads is None else (70, heads)
    x, codebook = torch.randn(*shape, 40), torch.randn(*shape[1:], 30, 40)
    mask = torch.rand(shape).T.clone().T < 0.5
    expected = emulated.vector_quantize_fwd(x, codebook, True, "float32", None)
    x[~mask] = math.nan
    quantized, indices, loss, _, counts, half_error = emulated.vector_quantize_fwd(x, codebook, True, "float32", mask)
    assert torch.equal(indices, torch.where(mask, expected[1], -1))
    assert torch.equal(quantized, torch.where(mask[..., None], expected[0], 0))
    assert torch.equal(half_error, torch.where(mask[..., None], expected[5], 0))
    torch.testing.assert_close(loss, 4 * half_error.square().sum() / (mask.sum() * 40))
    of_heads = counts.view(-1, 30)
    for head, row in enumerate(indices.view(70, -1).T):
        assert torch.equal(of_heads[head], torch.bincount(row[row >= 0], minlength=30))
    one = torch.ones(())
    grads = emulated.vector_quantize_bwd(x, one, one, half_error, indices, 30, heads or 1, True, True)
    assert not grads[0][~mask].any()
    assert not any(grad.isnan().any() for grad in grads)
    none = emulated.vector_quantize_fwd(x, codebook, True, "float32", torch.zeros_like(mask))
    assert not any(none[place].any() for place in (0, 2, 4, 5))
    assert (none[1] == -1).all()


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-22, 3e-23, 1e-18, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_code_any_scale_equals_float64(emulated, dtype, scale):
    x, codes = ((torch.randn(n, 8) * scale).to(dtype) for n in (100, 200))
    assert torch.equal(nearest(emulated, x, codes), first_of_nearest(x, codes))
    # Values may be beyond float32.
    indices, _ = emulated.topk_codes(x, codes, 3, "l2", None)
    assert torch.equal(indices, exact_distances(x, codes).sort(dim=1, stable=True).indices[:, :3])


@pytest.mark.parametrize("outlier", [1e3, 1e8, 1e30])
def test_nearest_code_non_finite_code_leaves_others_exact(emulated, outlier):
    x, codes = torch.randn(200, 8), torch.randn(200, 8)
    # This element must not set the scale of the terms: its code is not finite.
    codes[7, 0], codes[7, 1] = outlier, torch.inf
    assert torch.equal(nearest(emulated, x, codes), first_of_nearest(x, codes))
    others = torch.cat([codes[:7], codes[8:]])
    indices, values = emulated.topk_codes(x, codes, 3, "l2", None)
    assert_same_topk(torch.where(indices > 7, indices - 1, indices), values, x, others)


def test_nearest_code_and_topk_very_different_lengths_equal_float64(emulated):
    x, codes = torch.randn(100, 16), torch.randn(200, 16)
    x *= 10.0 ** torch.randint(-30, 30, (100, 1))
    codes *= 10.0 ** torch.randint(-12, 12, (200, 1))
    distances = exact_distances(x, codes)
    # Beside a long row float64 rounds the short codes away.
    found = distances.gather(1, nearest(emulated, x, codes)[:, None])
    assert (found <= distances.amin(1, keepdim=True) * (1 + 1e-14)).all()
    for metric, exact in (("l2", distances), ("dot", -exact_products(x, codes))):
        indices, _ = emulated.topk_codes(x, codes, 5, metric, None)
        best = exact.sort(dim=1, stable=True).values[:, :5]
        torch.testing.assert_close(exact.gather(1, indices), best, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1e-10, 1e-20, 1e-25, 1e20])
def test_topk_products_any_scale_equals_float64(emulated, scale):
    # Only exact products order these neighbours.
    codes = (torch.randn(200, 64).repeat_interleave(2, 0) + 1e-7 * torch.randn(400, 64)) * scale
    x = torch.randn(50, 64)
    indices, _ = emulated.topk_codes(x, codes, 5, "dot", None)
    exact = exact_products(x, codes)
    assert torch.equal(indices, exact.sort(dim=1, descending=True, stable=True).indices[:, :5])


def test_topk_huge_or_non_finite_bias_equals_float64(emulated):
    x, codes, bias = torch.randn(20, 8), torch.randn(150, 8), torch.randn(150)
    bias[[17, 100, 30, 60, 90]] = torch.tensor([1e31, 1e38, -1e31, math.inf, math.nan])
    indices, values = emulated.topk_codes(x, codes, 150, "dot", bias)
    assert (indices[:, :2] == torch.tensor([100, 17])).all()
    assert (indices[:, -3:] == torch.tensor([30, 60, 90])).all()
    assert (values[:, -2] == torch.inf).all()
    assert values[:, -1].isnan().all()
    finite = bias.isfinite().nonzero().squeeze(1)
    place = torch.full((150,), -1)
    place[finite] = torch.arange(len(finite))
    assert_same_topk(place[indices[:, :148]], values[:, :148], x, codes[finite], metric="dot", bias=bias[finite])


@pytest.mark.parametrize("k", [1, 7, 40])
def test_topk_more_ties_than_the_selection_holds_equals_float64(emulated, k):
    # Beyond k + k / 4 + 32 in a power of two none are compared: without the second search nobody would write a result.
    codes = torch.randn(300, 6)
    codes[torch.randperm(300)[:200]] = torch.ones(6)
    x = torch.cat([torch.ones(3, 6), torch.randn(3, 6)])
    for metric in ("l2", "dot"):
        indices, _ = emulated.topk_codes(x, codes, k, metric, None)
        exact = exact_distances(x, codes) if metric == "l2" else -exact_products(x, codes)
        assert torch.equal(indices, exact.sort(dim=1, stable=True).indices[:, :k])


@pytest.mark.parametrize("d", [1025, 5000])
def test_products_several_chains_are_accurate(emulated, d):
    x, codes, bias = torch.randn(5, d), torch.randn(9, d) / d**0.5, torch.randn(9)
    for metric, offset in (("l2", None), ("dot", bias)):
        indices, values = emulated.topk_codes(x, codes, 9, metric, offset)
        assert_same_topk(indices, values, x, codes, metric=metric, bias=offset)
    assert torch.equal(nearest(emulated, x, codes), first_of_nearest(x, codes))
    assert_softmax(emulated, x, codes, bias, torch.arange(9).expand(5, 9))


def assert_softmax(emulated, x, weight, bias, indices, needs=(True, True, True)) -> None:
    values, sums = emulated.kept_softmax_fwd(x, weight, bias, indices)
    like, like_sums = reference.kept_softmax_fwd(x, weight, bias, indices)
    double = [each if each is None else each.double() for each in (x, weight, bias)]
    exact, exact_sums = reference.kept_softmax_fwd(*double, indices)
    assert_accurate(values, exact, like)
    grad = torch.randn(indices.shape)
    found = emulated.kept_softmax_bwd(grad, values, sums, x, weight, bias, indices, *needs)
    expected = reference.kept_softmax_bwd(grad, like, like_sums, x, weight, bias, indices, *needs)
    true = reference.kept_softmax_bwd(grad.double(), exact, exact_sums, *double, indices, *needs)
    for each in zip(found, true, expected, strict=True):
        assert_accurate(*each, floor=1e-5)


@pytest.mark.parametrize("needs", [(i & 1 > 0, i & 2 > 0, i & 4 > 0) for i in range(8)])
def test_kept_softmax_bwd_any_set_of_gradients_over_several_chunks_is_accurate(emulated, needs):
    n, k = 2 * TILE + 5, 140
    assert CHUNK_ELEMENTS // k // TILE <= 1, "several chunks"
    indices = torch.randint(0, k, (n, 3))
    assert_softmax(emulated, torch.randn(n, 20), torch.randn(k, 20), torch.randn(k), indices, needs)


@pytest.mark.parametrize("power", [-60, 57, 60, 90])
def test_kept_softmax_rows_beyond_float16_terms_is_accurate(emulated, power):
    x, weight = torch.randn(20, 8) * 2.0**power, torch.randn(30, 8) * 2.0**-power
    indices = torch.randint(0, 30, (20, 3))
    values, _ = emulated.kept_softmax_fwd(x, weight, None, indices)
    exact, _ = reference.kept_softmax_fwd(x.double(), weight.double(), None, indices)
    assert_accurate(values, exact, reference.kept_softmax_fwd(x, weight, None, indices)[0])


@pytest.mark.parametrize("power", [-65, 65])
def test_kept_softmax_long_half_precision_is_accurate(emulated, power):
    # The squares of codes, or of rows, are beyond float32; their products are not.
    x, weight = torch.randn(20, 8) * 2.0**-power, torch.randn(30, 8) * 2.0**power
    inputs = x.bfloat16(), weight.bfloat16(), None, torch.randint(0, 30, (20, 3))
    values, _ = emulated.kept_softmax_fwd(*inputs)
    exact, _ = reference.kept_softmax_fwd(inputs[0].double(), inputs[1].double(), *inputs[2:])
    assert_accurate(values, exact, reference.kept_softmax_fwd(*inputs)[0])


def test_kept_softmax_non_finite_inputs_equals_reference(emulated):
    x, weight, bias = torch.randn(20, 8), torch.randn(30, 8), torch.randn(30)
    x[2, 1], x[3, 1], bias[5] = math.nan, math.inf, -math.inf
    indices = torch.arange(30).expand(20, 30)
    values, _ = emulated.kept_softmax_fwd(x, weight, bias, indices)
    like, _ = reference.kept_softmax_fwd(x, weight, bias, indices)
    assert torch.equal(values.isnan(), like.isnan())
    torch.testing.assert_close(values, like, equal_nan=True)
    weight[7, 2] = -math.inf
    values, _ = emulated.kept_softmax_fwd(x.abs(), weight, bias, indices)
    torch.testing.assert_close(values, reference.kept_softmax_fwd(x.abs(), weight, bias, indices)[0], equal_nan=True)


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 256, 1000])
@pytest.mark.parametrize("d", [1, 130])
def test_sums_code_that_fills_many_chunks_are_exact(emulated, n, d):
    # One code has nearly all rows, and the codes beside it have none; integers, of which sums are exact.
    x = torch.randint(-8, 9, (n, d)).float()
    indices = torch.full((n,), 3)
    indices[::127] = 5
    expected = torch.zeros(7, d).index_add(0, indices, x)
    assert torch.equal(emulated.gather_codes_bwd(x, indices, 7, 1), expected)
    counts = torch.bincount(indices, minlength=7).float()[:, None]
    assert torch.equal(emulated.ema_statistics(x, indices, 7, 1), torch.cat([expected, counts], 1))
    outside = torch.where(indices == 5, 2**40, indices)
    expected[5] = 0
    assert torch.equal(emulated.gather_codes_bwd(x, outside, 7, 1), expected)


def test_operations_index_out_of_range_reads_nothing(emulated):
    x, codes, values = torch.randn(9, 5), torch.randn(6, 5), torch.randn(9, 2)
    indices = torch.randint(0, 6, (9, 2))
    outside = indices.clone()
    outside[0, 0], outside[1, 1], outside[2, 0] = -1, 6, -(2**62)
    is_in = outside == indices
    assert torch.equal(
        emulated.sparse_decode_fwd(values, outside, codes), emulated.sparse_decode_fwd(values * is_in, indices, codes)
    )
    found = emulated.sparse_decode_bwd(x, values, outside, codes, True, True)
    expected = emulated.sparse_decode_bwd(x, values * is_in, indices, codes, True, True)
    assert torch.equal(found[0], expected[0] * is_in)
    torch.testing.assert_close(found[1], expected[1])
    assert not emulated.kept_softmax_fwd(x, codes, None, outside)[0][~is_in].any()


def test_operations_invalid_arguments_raise_named_errors(emulated):
    x, codes, i, one = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 1).long(), torch.tensor(1.0)
    row, statistics = i[:, 0], torch.zeros(5, 4)
    for message, op, args in (
        (
            "expected x of dtype float32, bfloat16 or float16, got Double",
            "nearest_code",
            (x.double(), codes, False, "float32"),
        ),
        ("expected x of shape .* without dimensions", "nearest_code", (one, codes, False, "float32")),
        (r"expected codebook of shape \[K, D\] or .*, got \[3\]", "nearest_code", (x, codes[0], False, "float32")),
        (r"expected x of shape .* H = 4 .*, got \[2, 3\]", "nearest_code", (x, codes[:4, None], False, "float32")),
        (r"expected codebook of at most 65535 heads", "nearest_code", (x, one.expand(70_000, 1, 3), False, "float32")),
        ("expected mask of dtype bool .* each of the 2", "vector_quantize_fwd", (x, codes, True, "float32", row)),
        (r"expected codebook .* K >= 1, got \[0, 3\]", "nearest_code", (x, codes[:0], False, "float32")),
        ("expected x of D = 3 features as in codebook, got 2", "nearest_code", (x[:, :2], codes, False, "float32")),
        (r"expected codebook .* K >= 1, got \[0, 3\]", "vector_quantize_fwd", (x, codes[:0], True, "float32", None)),
        ("expected grad_quantized of the shape", "vector_quantize_bwd", (x[:1], one, one, x, row, 5, 1, True, True)),
        ("2 vectors of half_error, got 1", "vector_quantize_bwd", (x, one, one, x, row[:1], 5, 1, True, True)),
        ("expected grad_codebook_loss to be one", "vector_quantize_bwd", (x, x, one, x, row, 5, 1, True, True)),
        (
            "expected grad_commitment_loss to be one",
            "vector_quantize_bwd",
            (x, one, one.double(), x, row, 5, 1, True, True),
        ),
        (r"expected k in .*\[1, 5\] .*, got 6", "topk_codes", (x, codes, 6, "l2", None)),
        (r"expected k in .*\[1, 5\] .*, got 0", "topk_codes", (x, codes, 0, "l2", None)),
        ("at most 1024, got 1025", "topk_codes", (x, codes.repeat(300, 1), 1025, "l2", None)),
        ("expected metric to be 'l2' or 'dot', got 'cosine'", "topk_codes", (x, codes, 1, "cosine", None)),
        ("expected bias to be None", "topk_codes", (x, codes, 1, "l2", torch.zeros(5))),
        (r"expected bias of shape .*\[5\], got \[4\]", "topk_codes", (x, codes, 1, "dot", torch.zeros(4))),
        (r"expected bias of shape .*\[5\], got \[4\]", "kept_softmax_fwd", (x, codes, torch.zeros(4), i)),
        (r"expected weight of shape \[K, D\], got \[3\]", "kept_softmax_fwd", (x, codes[0], None, i)),
        ("expected indices .* for the 2 vectors of x", "kept_softmax_fwd", (x, codes, None, i[:1])),
        ("expected indices of dtype int64, got Int", "kept_softmax_fwd", (x, codes, None, i.int())),
        (
            "expected grad and values of the shape of indices",
            "kept_softmax_bwd",
            (x, x, x[:, :2], x, codes, None, i, True, True, False),
        ),
        ("2 vectors of grad, got 1", "gather_codes_bwd", (x, row[:1], 5, 1)),
        (r"expected codebook of shape \[K, D\] or .*, got \[3\]", "gather_codes_fwd", (x[0], row)),
        (r"expected indices of shape .* H = 4 .*, got \[2\]", "gather_codes_fwd", (codes[:4, None], row)),
        ("2 vectors of x, got 1", "ema_statistics", (x, row[:1], 5, 1)),
        (
            "expected cluster_size, embed_sum and statistics of shapes",
            "ema_step",
            (codes, x[0], codes, statistics, 0.9, 1e-5),
        ),
        ("expected values and indices of one shape", "sparse_decode_fwd", (x, i, codes)),
        ("expected dictionary of shape", "sparse_decode_fwd", (x[:, :1], i, codes[:0])),
        ("expected grad of shape", "sparse_decode_bwd", (x[:, :2], x[:, :1], i, codes, True, True)),
        ("expected indices of shape", "one_hot", (i[None], 5, torch.float32)),
        ("expected num_codes to be at least 1, got 0", "one_hot", (row, 0, torch.float32)),
    ):
        with pytest.raises(RuntimeError, match=message):
            getattr(emulated, op)(*args)

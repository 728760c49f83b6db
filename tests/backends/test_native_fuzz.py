"""The compiled operations on shapes, strides, types and odd values that hypothesis chooses."""

from __future__ import annotations

import math
import os
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlvae_kernels.backends import BACKENDS, native, reference, unavailable_reason, use_backend
from dlvae_kernels.testing import assert_accurate, assert_same_codes, assert_same_topk, exact_distances, exact_products

from .fuzzing import SEEDS, fuzz_settings

SETS = [
    *native.instruction_sets(),
    *([pytest.param("emulated", marks=pytest.mark.emulator)] if "emulated" in BACKENDS else []),
]
TYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD = (math.nan, math.inf, -math.inf)
# Sizes below and above a register, a tile, a panel and a block of rows, for any instruction set.
ROWS, CODES, FEATURES = st.integers(0, 70), st.integers(1, 80), st.integers(1, 40)
# The dimension of heads, if there is one.
HEADS = st.sampled_from(((), (), (1,), (3,)))


def fuzz(*ops: str):
    """A test on each instruction set; needs the compiled `ops`."""
    reasons = [f"native, {op}: {reason}" for op in ops if (reason := unavailable_reason("native", op)) is not None]

    def decorate(test):
        test = fuzz_settings(given(data=st.data())(test))
        test = pytest.mark.parametrize("cpu", SETS or ["none"])(test)
        return pytest.mark.skipif(bool(reasons), reason=next(iter(reasons), ""))(test)

    return decorate


def run(cpu: str, op: str, *args):
    if cpu == "emulated":
        with use_backend(cpu):
            return getattr(torch.ops.dlvae, op)(*args)
    with mock.patch.dict(os.environ, DLVAE_CPU=cpu), use_backend("native"):
        return getattr(torch.ops.dlvae, op)(*args)


def tensor(data: st.DataObject, *shape: int, types=TYPES, scale=True, odd=False) -> Tensor:
    """Numbers of one of several kinds in any layout: dimensions in any order, with gaps, beyond an offset, expanded."""
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.sampled_from((1, 1, 1, 2))) for _ in shape]
    expanded = [data.draw(st.sampled_from((False,) * 9 + (True,))) and size > 0 for size in shape]
    sizes = [1 if expanded[i] else shape[i] for i in order]
    room = [size * steps[i] for size, i in zip(sizes, order, strict=True)]
    offset = data.draw(st.integers(0, 3))
    count = math.prod(room) + offset
    if data.draw(st.sampled_from((False, False, True))):
        memory = torch.randint(-1, 2, (count,), generator=generator).float()
    else:
        memory = torch.randn(count, generator=generator)
    if scale:
        # Powers of two: sums of integers stay exact, and ties are ties in any order of addition.
        memory *= data.draw(st.sampled_from((1.0, 1.0, 2.0**-10, 2.0**10)))
    memory = memory.to(data.draw(st.sampled_from(types)))
    if odd and count > offset:
        for value in data.draw(st.lists(st.sampled_from(ODD), max_size=3)):
            memory[data.draw(st.integers(offset, count - 1))] = value
    values = memory[offset:].view(room)[tuple(slice(None, None, steps[i]) for i in order)]
    values = values.permute([order.index(i) for i in range(len(shape))])
    return values.expand(shape)


def leading(data: st.DataObject, count: int) -> tuple[int, ...]:
    """Dimensions of about `count` rows: one, two or three, or 12, of which not all can be joined."""
    shapes = (count,), (2, (count + 1) // 2), (3, 1, count // 3), (2,) * 6 + (1,) * 5 + (count // 64,)
    return data.draw(st.sampled_from(shapes))


def indices_below(data: st.DataObject, bound: int, *shape: int, lowest: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    # Either two codes share all vectors, or any code may occur.
    bound = data.draw(st.sampled_from((bound, min(bound, 2))))
    return torch.randint(lowest, bound, shape, generator=generator)


def double(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_like_reference(cpu: str, op: str, *args) -> None:
    """Results of an operation that does not search: as accurate as the reference, and not finite where it is not."""
    results, expected, exact = (
        (found,) if isinstance(found, Tensor) else found
        for found in (
            run(cpu, op, *args),
            getattr(reference, op)(*args),
            getattr(reference, op)(*map(double, args)),
        )
    )
    for result, like, true in zip(results, expected, exact, strict=True):
        assert (result.dtype, result.shape) == (like.dtype, like.shape)
        assert result.numel() == 0 or result.stride() == like.stride()
        finite = like.isfinite()
        assert torch.equal(result.isfinite(), finite)
        assert torch.equal(result.isnan(), like.isnan())
        assert_accurate(*(torch.where(finite, part, 0) for part in (result, true, like)))


def assert_sums(cpu: str, op: str, *args) -> None:
    """Results whose elements are sums of products: each is as exact as the sum of the magnitudes allows."""
    results, exact, magnitudes = (
        (found,) if isinstance(found, Tensor) else found
        for found in (
            run(cpu, op, *args),
            getattr(reference, op)(*map(double, args)),
            getattr(reference, op)(*(each.abs() if isinstance(each, Tensor) else each for each in map(double, args))),
        )
    )
    like = getattr(reference, op)(*args)
    for result, true, size, expected in zip(
        results, exact, magnitudes, (like,) if isinstance(like, Tensor) else like, strict=True
    ):
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        finite = expected.isfinite()
        assert torch.equal(result.isfinite(), finite)
        assert torch.equal(result.isnan(), expected.isnan())
        # Chains of at most 128 additions in float32, and the rounding of the result.
        rounding = torch.finfo(result.dtype)
        bound = 160 * 2.0**-24 * size + rounding.eps * (true.abs() + rounding.smallest_normal)
        assert ((result.double() - true).abs() <= bound)[finite].all()


def assert_nearest(indices: Tensor, x: Tensor, codebook: Tensor) -> None:
    rows, chosen = x.reshape(-1, x.shape[-1]), indices.flatten()
    assert indices.shape == x.shape[:-1]
    assert ((chosen >= 0) & (chosen < len(codebook))).all()
    assert not chosen[rows.isnan().any(1)].any()
    is_nan_code, is_finite_code = codebook.isnan().any(1), codebook.isfinite().all(1)
    if not is_nan_code.all():
        assert not is_nan_code[chosen[~rows.isnan().any(1)]].any()
    finite = rows.isfinite().all(1)
    if is_finite_code.any():
        assert is_finite_code[chosen[finite]].all()
        place = is_finite_code.cumsum(0) - 1
        assert_same_finite_codes(place[chosen[finite]], rows[finite], codebook[is_finite_code])


def ranks_alike_in_any_order(rows: Tensor, codes: Tensor, metric: str, bias: Tensor | None = None) -> Tensor:
    """Rows [N] whose codes are ranked alike by float64 sums over the features in any order.

    Their scores are exact, or further apart than the sums may err, or those of equal codes. Rows of equal features have
    many codes at one distance, whose sums of the same squares round differently.
    """
    rows, codes = rows.double()[:, None], codes.double()
    terms = (rows - codes).square() if metric == "l2" else rows * codes
    scores, largest = terms.sum(2), terms.abs().sum(2).amax(1, keepdim=True)
    unit = 2.0 ** (torch.frexp(largest).exponent - 53).double()
    is_exact = (torch.remainder(terms, unit[:, None]) == 0).all(2).all(1)
    if bias is not None:
        scores, largest = scores + bias.double(), largest + bias.double().abs().max()
    order = scores.argsort(dim=1, stable=True)
    is_apart = scores.gather(1, order).diff(dim=1) > 2.0**-46 * largest
    is_equal = (codes[order[:, 1:]] == codes[order[:, :-1]]).all(2)
    return is_exact | (is_apart | is_equal).all(1)


def assert_same_finite_codes(chosen: Tensor, rows: Tensor, codes: Tensor) -> None:
    """Like `assert_same_codes`, but where the order of features decides between two sums in float64, either may win."""
    distances, is_certain = exact_distances(rows, codes), ranks_alike_in_any_order(rows, codes, "l2")
    assert_same_codes(chosen[is_certain], rows[is_certain], codes, max_near_ties=1)
    found = distances.gather(1, chosen[:, None]).squeeze(1)[~is_certain]
    assert (found <= distances[~is_certain].amin(1) * (1 + 2.0**-46)).all()


def codebook_for(data: st.DataObject, x: Tensor, *shape: int, odd: bool) -> Tensor:
    """A codebook of the dtype of x or of float32, sometimes with equal codes."""
    codes = tensor(data, *shape, types=(x.dtype, torch.float32), odd=odd)
    return codes[indices_below(data, len(codes), len(codes))] if data.draw(st.booleans()) else codes


def at_one_scale(data: st.DataObject, x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Both times one power of two, which changes no index; where float16 takes part, as they are."""
    # Squares down to 2^-120 are normal numbers of float32.
    unit = data.draw(st.sampled_from((1.0, 1.0, 2.0**-48, 2.0**48)))
    return (x, codebook) if torch.float16 in (x.dtype, codebook.dtype) else (x * unit, codebook * unit)


@fuzz("nearest_code")
def test_nearest_code_random_inputs_equals_float64(cpu, data):
    d = data.draw(FEATURES)
    x = tensor(data, *leading(data, data.draw(ROWS)), d, odd=True)
    x, codebook = at_one_scale(data, x, codebook_for(data, x, data.draw(CODES), d, odd=True))
    precision = data.draw(st.sampled_from(("float32", "exact")))
    indices, distances = run(cpu, "nearest_code", x, codebook, True, precision)
    assert_nearest(indices, x, codebook)
    assert torch.equal(indices, run(cpu, "nearest_code", x, codebook, False, precision)[0])
    assert distances.dtype == torch.float32
    exact = (x.double() - codebook.double()[indices]).square().sum(-1).float()
    torch.testing.assert_close(distances, exact, rtol=1e-5, atol=0, equal_nan=True)


@fuzz("vector_quantize_fwd")
def test_vector_quantize_fwd_random_inputs_equals_reference(cpu, data):
    d = data.draw(FEATURES)
    x = tensor(data, *leading(data, data.draw(ROWS)), d)
    codebook = codebook_for(data, x, data.draw(CODES), d, odd=False)
    args = x, codebook, data.draw(st.booleans()), "float32", None
    results, like = run(cpu, "vector_quantize_fwd", *args), reference.vector_quantize_fwd(*args)
    quantized, indices, codebook_loss, commitment_loss, counts, half_error = results
    assert_nearest(indices, x, codebook)
    for result, expected in zip(results, like, strict=True):
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        assert result.numel() == 0 or result.stride() == expected.stride()
    codes = codebook[indices]
    assert torch.equal(quantized, codes.to(x.dtype))
    assert torch.equal(counts, torch.bincount(indices.flatten(), minlength=len(codebook)))
    exact = (codes.double() - x.double()).square().sum() / max(1, x.numel())
    torch.testing.assert_close(codebook_loss, exact.float(), rtol=1e-5, atol=0)
    assert torch.equal(codebook_loss, commitment_loss)
    if args[2]:
        assert torch.equal(half_error, ((codes.float() - x.float()) / 2).to(x.dtype))


@fuzz("nearest_code", "vector_quantize_fwd")
def test_vector_quantize_fwd_heads_and_mask_equal_each_head(cpu, data):
    (heads,), k, d = data.draw(HEADS.filter(bool)), data.draw(CODES), data.draw(FEATURES)
    x = tensor(data, *leading(data, data.draw(ROWS)), heads, d)
    codebook = tensor(data, heads, k, d, types=(x.dtype, torch.float32))
    mask = indices_below(data, 2, *x.shape[:-1]).bool() if data.draw(st.booleans()) else None
    found = run(cpu, "nearest_code", x, codebook, False, "float32")[0]
    quantized, indices, loss, _, counts, half_error = run(
        cpu, "vector_quantize_fwd", x, codebook, True, "float32", mask
    )
    valid = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    assert torch.equal(indices, found.masked_fill(~valid, -1))
    exact = 0.0
    for head in range(heads):
        assert_nearest(found[..., head], x[..., head, :], codebook[head])
        is_valid, codes = valid[..., head], codebook[head][found[..., head]]
        errors = torch.where(is_valid[..., None], codes.float() - x[..., head, :].float(), 0)
        assert torch.equal(half_error[..., head, :], (errors / 2).to(x.dtype))
        assert torch.equal(quantized[..., head, :], torch.where(is_valid[..., None], codes, 0).to(x.dtype))
        assert torch.equal(counts[head], torch.bincount(found[..., head][is_valid], minlength=k))
        exact += errors.double().square().sum() / max(1, int(valid.sum()) * d)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)


@fuzz("vector_quantize_bwd")
def test_vector_quantize_bwd_random_inputs_equals_reference(cpu, data):
    heads = data.draw(HEADS)
    shape = *leading(data, data.draw(ROWS)), *heads, data.draw(FEATURES)
    error, k = tensor(data, *shape, odd=True), data.draw(CODES)
    grad = tensor(data, *shape, types=(error.dtype,), odd=True)
    losses = (torch.tensor(data.draw(st.sampled_from((0.0, 1.0, 0.25)))) for _ in range(2))
    needs = data.draw(st.booleans()), data.draw(st.booleans())
    assert_like_reference(
        cpu,
        "vector_quantize_bwd",
        grad,
        *losses,
        error,
        indices_below(data, k, *shape[:-1], lowest=-1),
        k,
        math.prod(heads),
        *needs,
    )


@fuzz("topk_codes")
def test_topk_codes_random_inputs_equals_float64(cpu, data):
    d, count = data.draw(FEATURES), data.draw(CODES)
    x = tensor(data, *leading(data, data.draw(ROWS)), d)
    x, dictionary = at_one_scale(data, x, codebook_for(data, x, count, d, odd=False))
    k = data.draw(st.integers(1, count))
    metric = data.draw(st.sampled_from(("l2", "dot")))
    has_bias = metric == "dot" and data.draw(st.booleans())
    bias = tensor(data, count, types=(torch.float32,)) if has_bias else None
    indices, values = run(cpu, "topk_codes", x, dictionary, k, metric, bias)
    assert indices.shape == values.shape == (*x.shape[:-1], k)
    rows, found, given = x.reshape(-1, d), indices.reshape(-1, k), values.reshape(-1, k)
    scores = exact_distances(rows, dictionary) if metric == "l2" else exact_products(rows, dictionary, bias)
    # Where the order of features decides between two sums in float64, only the values are compared.
    is_certain = ranks_alike_in_any_order(rows, dictionary, metric, bias)
    assert_same_topk(found[is_certain], given[is_certain], rows[is_certain], dictionary, metric=metric, bias=bias)
    best = scores.sort(1, descending=metric == "dot").values[:, :k]
    largest = float(scores.abs().max()) if scores.numel() > 0 else 0.0
    torch.testing.assert_close(scores.gather(1, found), best, rtol=2.0**-20, atol=2.0**-20 * largest)


@fuzz("topk_codes")
def test_topk_codes_non_finite_inputs_rank_last(cpu, data):
    d, count = data.draw(FEATURES), data.draw(CODES)
    x = tensor(data, data.draw(ROWS), d, odd=True)
    dictionary = codebook_for(data, x, count, d, odd=True)
    k = data.draw(st.integers(1, count))
    metric = data.draw(st.sampled_from(("l2", "dot")))
    indices, values = run(cpu, "topk_codes", x, dictionary, k, metric, None)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    assert ((indices >= 0) & (indices < count)).all()
    is_nan_row, is_nan_code = x.isnan().any(-1), dictionary.isnan().any(1)
    assert torch.equal(indices[is_nan_row], torch.arange(k).expand(int(is_nan_row.sum()), k))
    # A code that holds NaN comes after all that do not.
    assert (is_nan_code[indices[~is_nan_row]].int().diff(dim=-1) >= 0).all()
    assert (is_nan_code[indices[~is_nan_row]].sum(-1) == max(0, k - int((~is_nan_code).sum()))).all()
    finite = x.isfinite().all(-1)
    if dictionary.isfinite().all():
        assert_same_topk(indices[finite], values[finite], x[finite], dictionary, metric=metric)
    exact = (exact_distances if metric == "l2" else exact_products)(x, dictionary).gather(1, indices)
    assert torch.equal(values.isnan(), exact.isnan())


@fuzz("one_hot")
def test_one_hot_random_inputs_equals_reference(cpu, data):
    k, n = data.draw(CODES), data.draw(ROWS)
    shape = data.draw(st.sampled_from(((n,), (n, 3))))
    indices = indices_below(data, k, *shape)
    indices = data.draw(st.sampled_from((indices, indices.flip(0), indices.repeat_interleave(2, 0)[::2])))
    dtype = data.draw(st.sampled_from((*TYPES, torch.int64)))
    result = run(cpu, "one_hot", indices, k, dtype)
    assert torch.equal(result, reference.one_hot(indices, k, dtype))
    assert result.dtype == dtype


@fuzz("gather_codes_fwd", "gather_codes_bwd")
def test_gather_codes_random_inputs_equals_reference(cpu, data):
    k, d, heads = data.draw(CODES), data.draw(FEATURES), data.draw(HEADS)
    indices = indices_below(data, k, *leading(data, data.draw(ROWS)), *heads, lowest=-1)
    assert_like_reference(cpu, "gather_codes_fwd", tensor(data, *heads, k, d, odd=True), indices)
    grad = tensor(data, *indices.shape, d, odd=True)
    assert_like_reference(cpu, "gather_codes_bwd", grad, indices, k, math.prod(heads))


@fuzz("ema_statistics")
def test_ema_statistics_random_inputs_equals_reference(cpu, data):
    k, heads = data.draw(CODES), data.draw(HEADS)
    x = tensor(data, *leading(data, data.draw(ROWS)), *heads, data.draw(FEATURES), odd=True)
    indices = indices_below(data, k, *x.shape[:-1], lowest=-1)
    assert_like_reference(cpu, "ema_statistics", x, indices, k, math.prod(heads))


@fuzz("ema_step")
def test_ema_step_random_inputs_equals_reference(cpu, data):
    d, wide, shape = data.draw(FEATURES), (torch.float32,), (*data.draw(HEADS), data.draw(CODES))
    codebook, total = (tensor(data, *shape, d, types=wide) for _ in range(2))
    state = codebook, tensor(data, *shape, types=wide).abs(), total
    statistics = tensor(data, *shape, d + 1, types=wide).abs()
    options = data.draw(st.sampled_from((0.0, 0.3, 0.99, 1.0))), data.draw(st.sampled_from((0.0, 1e-5)))
    state = [each.contiguous() if 0 in each.stride() else each for each in state]
    native_state, like, exact = ([change(each) for each in state] for change in (Tensor.clone, Tensor.clone, double))
    run(cpu, "ema_step", *native_state, statistics, *options)
    reference.ema_step(*like, statistics, *options)
    reference.ema_step(*exact, statistics.double(), *options)
    for result, expected, true in zip(native_state, like, exact, strict=True):
        assert_accurate(result, true, expected)


@fuzz("sparse_decode_fwd", "sparse_decode_bwd")
def test_sparse_decode_random_inputs_equals_reference(cpu, data):
    count, d, k = data.draw(CODES), data.draw(FEATURES), data.draw(st.integers(1, 35))
    dictionary = tensor(data, count, d, odd=True)
    shape = leading(data, data.draw(ROWS))
    values = tensor(data, *shape, k, types=(dictionary.dtype, torch.float32))
    indices = indices_below(data, count, *shape, k)
    assert_sums(cpu, "sparse_decode_fwd", values, indices, dictionary)
    grad = tensor(data, *shape, d, types=(torch.promote_types(values.dtype, dictionary.dtype),))
    dictionary = dictionary.nan_to_num(0, 0, 0)
    needs = data.draw(st.booleans()), data.draw(st.booleans())
    assert_sums(cpu, "sparse_decode_bwd", grad, values, indices, dictionary, *needs)


@fuzz("kept_softmax_fwd", "kept_softmax_bwd")
def test_kept_softmax_random_inputs_equals_formula(cpu, data):
    count, d = data.draw(CODES), data.draw(FEATURES)
    k = data.draw(st.integers(1, min(count, 20)))
    x = tensor(data, *leading(data, data.draw(ROWS)), d, scale=False)
    types = (x.dtype, torch.float32)
    weight = tensor(data, count, d, types=types, scale=False)
    bias = tensor(data, count, types=(weight.dtype,), scale=False) if data.draw(st.booleans()) else None
    # Distinct in each row.
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    indices = torch.rand(*x.shape[:-1], count, generator=generator).argsort(-1)[..., :k]
    values, sums = run(cpu, "kept_softmax_fwd", x, weight, bias, indices)
    grad = tensor(data, *indices.shape, types=(torch.float32,), scale=False)
    needs = data.draw(st.booleans()), data.draw(st.booleans()), bias is not None and data.draw(st.booleans())
    args = x, weight, bias, indices, *needs
    found = run(cpu, "kept_softmax_bwd", grad, values, sums, *args)
    assert values.dtype == sums.dtype == torch.float32
    assert sums.shape == reference.kept_softmax_fwd(x, weight, bias, indices)[1].shape

    # The dense formula in float64, and the sums of the magnitudes of its terms.
    rows, codes, extra = x.reshape(-1, d).double(), weight.double(), bias.double() if bias is not None else 0
    grads, places = grad.reshape(-1, k).double(), indices.reshape(-1, k)
    softmax = (rows @ codes.T + extra).softmax(1)
    exact = softmax.gather(1, places)
    logits = float((rows.abs() @ codes.T.abs() + abs(extra)).max()) if rows.numel() > 0 else 0.0
    # The rounding of a logit is a relative error of its exponential.
    relative = 2.0**-24 * (2 * (d + 4) * logits + 64)
    assert ((values.reshape(-1, k).double() - exact).abs() <= relative * exact + 2.0**-126).all()
    dense = torch.zeros_like(softmax).scatter(1, places, grads)
    slope = softmax * (dense - (dense * softmax).sum(1, keepdim=True))
    size = softmax * (dense.abs() + (dense * softmax).abs().sum(1, keepdim=True))
    true = slope @ codes, slope.T @ rows, slope.sum(0)
    sizes = size @ codes.abs(), size.T @ rows.abs(), size.sum(0)
    for result, precise, magnitude, need in zip(found, true, sizes, needs, strict=True):
        bound = (4 * relative + 200 * 2.0**-24) * magnitude
        assert (
            not need or ((result.double() - precise.reshape(result.shape)).abs() <= bound.reshape(result.shape)).all()
        )


THREADED = {
    "nearest_code": lambda x, codes, i, w: (x, codes, True, "float32"),
    "topk_codes": lambda x, codes, i, w: (x, codes, 8, "l2", None),
    "vector_quantize_fwd": lambda x, codes, i, w: (x, codes, True, "float32", None),
    "vector_quantize_bwd": lambda x, codes, i, w: (
        x,
        w[0, 0],
        w[0, 1],
        x,
        i[..., 0].contiguous(),
        len(codes),
        1,
        True,
        True,
    ),
    "gather_codes_bwd": lambda x, codes, i, w: (x, i[..., 0], len(codes), 1),
    "ema_statistics": lambda x, codes, i, w: (x, i[..., 0], len(codes), 1),
    "rotation_trick_bwd": lambda x, codes, i, w: (x, x.flip(0), x.roll(1, 0)),
    "sparse_decode_fwd": lambda x, codes, i, w: (w, i, codes),
    "sparse_decode_bwd": lambda x, codes, i, w: (x, w, i, codes, True, True),
    "kept_softmax_fwd": lambda x, codes, i, w: (x, codes, None, i),
    "code_entropy_fwd": lambda x, codes, i, w: (x, codes, 1.0, None),
}


# The same with four heads.
THREADED_HEADS = {
    "vector_quantize_fwd": lambda x, codes, i, w: (x, codes.view(4, 75, 6), True, "float32", None),
    "gather_codes_bwd": lambda x, codes, i, w: (x, i, len(codes), 4),
    "ema_statistics": lambda x, codes, i, w: (x, i, len(codes), 4),
}


@pytest.mark.parametrize("op", THREADED_HEADS)
def test_operations_with_heads_any_number_of_threads_are_bitwise_reproducible(op):
    x, codes = torch.randn(1500, 4, 6), torch.randn(300, 6)
    assert_reproducible(op, THREADED_HEADS[op](x, codes, torch.randint(-1, 300, (1500, 4)), None))


@pytest.mark.parametrize("op", THREADED)
def test_operations_any_number_of_threads_are_bitwise_reproducible(op):
    x, codes = torch.randn(4000, 24), torch.randn(300, 24)
    indices = torch.rand(4000, 300).argsort(1)[:, :6]
    # Most pairs are of few codes.
    indices[:3000, 0] = 7
    assert_reproducible(op, THREADED[op](x, codes, indices, torch.randn(4000, 6)))


def assert_reproducible(op: str, args: tuple) -> None:
    if (reason := unavailable_reason("native", op)) is not None:
        pytest.skip(f"native, {op}: {reason}")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found = run(native.instruction_set(), op, *args)
            results.append((found,) if isinstance(found, Tensor) else found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

"""The compiled `topk_codes` and `kept_softmax`: sizes around the edges of their blocks, ties, masks, and threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dlvae_kernels import topk_codes, use_backend
from dlvae_kernels.backends import native
from dlvae_kernels.testing import assert_accurate, exact_distances, exact_products

from . import hard_data
from .speed import slowdown, subnormal_penalty

REASON = native.unavailable_reason("topk_codes")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def can_run(name: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLVAE_CPU", name)
        try:
            return torch.ops.dlvae_native.cpu_name() == name
        except (AttributeError, RuntimeError):
            return False


INSTRUCTION_SETS = [name for name in ("portable", "avx2", "avx512", "vnni") if can_run(name)]


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("DLVAE_CPU", request.param)
    with use_backend("native"):
        yield request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_exact(x, dictionary, k, metric="l2", bias=None):
    """The indices in the very order of float64: float32 alone does not reach that."""
    scores = exact_distances(x, dictionary) if metric == "l2" else -exact_products(x, dictionary, bias)
    best = scores.sort(dim=1, stable=True)
    indices, values = topk_codes(x, dictionary, k, metric=metric, bias=bias)
    assert torch.equal(indices, best.indices[:, :k])
    expected = best.values[:, :k] if metric == "l2" else -best.values[:, :k]
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-4)
    assert (values.diff(dim=1) * (1 if metric == "l2" else -1) >= 0).all()


# Rows of a tile and of a block, panels, chunks of codes, chains and slices of features.
EDGES = [(n, 40, 5) for n in (7, 8, 9, 127, 128, 129)]
EDGES += [(20, num_codes, 5) for num_codes in (1, 15, 31, 33, 511, 512, 513, 1025)]
EDGES += [(20, 40, d) for d in (1, 63, 65, 255, 256, 257, 700)]


@pytest.mark.parametrize("size", EDGES)
def test_topk_sizes_around_block_edges_equals_float64(size):
    n, num_codes, d = size
    x, dictionary, bias = torch.randn(n, d), torch.randn(num_codes, d), torch.randn(num_codes)
    for k in {1, num_codes // 3 + 1, num_codes}:
        assert_exact(x, dictionary, k)
        assert_exact(x, dictionary, k, "dot", bias)


@pytest.mark.parametrize("k", [1, 100, 320, 700, 1500])
def test_topk_any_k_equals_float64(k):
    """Candidates of several chunks, sorted by ranks and by digits."""
    x, dictionary = torch.randn(30, 24), torch.randn(3000, 24)
    assert_exact(x, dictionary, k)
    assert_exact(x, dictionary, k, "dot")
    # The best come last, so that the candidates change with every chunk.
    dictionary *= torch.linspace(3, 0.1, 3000)[:, None]
    assert_exact(x, dictionary, k)


@pytest.mark.parametrize("num_codes", [300, 3000])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_topk_too_many_near_ties_searches_in_float64(num_codes, metric):
    """Only a search in float64 orders the scores, all of which are ties in float32."""
    x = torch.randn(9, 16) * 1000
    dictionary = torch.randn(1, 16) + torch.randn(num_codes, 16) * 2.0**-22
    single = (dictionary @ x.T) if metric == "dot" else dictionary.square().sum(1, keepdim=True) / 2 - dictionary @ x.T
    assert len(single[:, 0].unique()) < num_codes / 2
    assert_exact(x, dictionary, 7, metric)


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_topk_few_near_ties_equals_float64(metric):
    """Triples of such codes, some of them over the edge of the selection."""
    dictionary = torch.randn(200, 48).repeat(3, 1)
    dictionary[200:] += torch.randn(400, 48) * 2.0**-24
    for k in (1, 2, 7, 50):
        assert_exact(torch.randn(60, 48), dictionary, k, metric)


@pytest.mark.parametrize("num_codes", [300, 3000])
def test_topk_exact_ties_go_by_index(num_codes):
    x = torch.randint(-1, 2, (40, 3)).float()
    dictionary = torch.randint(-1, 2, (num_codes, 3)).float()
    for k in (1, 20, num_codes // 2):
        assert_exact(x, dictionary, k)
        assert_exact(x, dictionary, k, "dot", torch.randint(0, 2, (num_codes,)).float())


@pytest.mark.parametrize("mask", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_topk_large_negative_bias_equals_float64(mask):
    x, dictionary, bias = torch.randn(20, 32), torch.randn(1500, 32), torch.randn(1500)
    bias[torch.rand(1500) < 0.9] = mask
    assert_exact(x, dictionary, 50, "dot", bias)


@pytest.mark.parametrize("left", [0, 3, 100])
def test_topk_infinite_bias_ranks_last(left):
    """Infinite products follow the finite ones by index, and codes that hold NaN come last."""
    x, dictionary, bias = torch.randn(20, 32), torch.randn(700, 32), torch.full((700,), -torch.inf)
    on = torch.randperm(700)[:left].sort().values
    bias[on] = 0
    dictionary[5], bias[5] = torch.nan, -torch.inf
    on = on[on != 5]
    indices, values = topk_codes(x, dictionary, 700, metric="dot", bias=bias)
    off = torch.tensor([i for i in range(700) if i not in [5, *on.tolist()]])
    expected = exact_products(x, dictionary[on]).sort(dim=1, descending=True)
    assert torch.equal(indices[:, : len(on)], on[expected.indices])
    torch.testing.assert_close(values[:, : len(on)], expected.values.float())
    assert (indices[:, len(on) :] == torch.cat([off, torch.tensor([5])])).all()
    assert (values[:, len(on) : -1] == -torch.inf).all()
    assert values[:, -1].isnan().all()


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e10, 1e30])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_topk_any_magnitude_equals_float64(scale, metric):
    x, dictionary = torch.randn(20, 16), torch.randn(80, 16)
    for x_scale, scale_of_codes in ((1, scale), (scale, 1), (scale, scale)):
        rows, codes = x * x_scale, dictionary * scale_of_codes
        exact = exact_distances(rows, codes) if metric == "l2" else -exact_products(rows, codes)
        indices = topk_codes(rows, codes, 9, metric=metric)[0]
        assert torch.equal(indices, exact.sort(dim=1, stable=True).indices[:, :9])


def test_topk_long_code_and_non_finite_rows_leave_other_rows_exact():
    x, dictionary = torch.randn(20, 16), torch.randn(600, 16)
    dictionary[77] *= 1e6
    assert_exact(x, dictionary, 9)
    expected = topk_codes(x, dictionary, 9)
    changed = x.clone()
    changed[3, 2], changed[4, 1] = torch.nan, torch.inf
    indices, distances = topk_codes(changed, dictionary, 9)
    assert (indices[3:5] == torch.arange(9)).all()
    assert distances[3].isnan().all()
    assert (distances[4] == torch.inf).all()
    others = [i for i in range(20) if i not in (3, 4)]
    assert torch.equal(indices[others], expected[0][others])


@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("name", sorted(hard_data.CASES.keys() - {"infinite_rows"}))
def test_topk_hard_data_equals_float64(name, metric, k):
    # Few rows take another way, unless k is a large part of the codes.
    for n, num_codes, d in ((40, 300, 24), (20, 1500, 3), (5, 600, 24)):
        x, dictionary = hard_data.draw(name, n, num_codes, d)
        exact = exact_distances(x, dictionary) if metric == "l2" else -exact_products(x, dictionary)
        best = exact.sort(dim=1, stable=True)
        indices, values = topk_codes(x, dictionary, k, metric=metric)
        assert torch.equal(indices, best.indices[:, :k])
        expected = best.values[:, :k] if metric == "l2" else -best.values[:, :k]
        terms = x.double().norm(dim=1)[:, None] * dictionary.double().norm(dim=1)[indices] + expected.abs()
        assert ((values - expected).abs() <= 1e-6 * terms + 1e-44).all()


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_topk_repeated_codes_go_by_index_with_ties(metric):
    """Groups of equal codes, of which several tie with one another, and codes that are not finite."""
    x = torch.randint(-1, 2, (30, 3)).float()
    dictionary, bias = torch.randint(-1, 2, (400, 3)).float(), torch.randint(0, 2, (400,)).float()
    for k in (1, 5, 40, 400):
        assert_exact(x, dictionary, k, metric, bias if metric == "dot" else None)
    dictionary[7], dictionary[9] = torch.nan, torch.inf
    indices = topk_codes(x + 0.5, dictionary, 400, metric=metric)[0]
    finite = [i for i in range(400) if i not in (7, 9)]
    exact = exact_distances(x + 0.5, dictionary[finite])
    if metric == "dot":
        exact = -exact_products(x + 0.5, dictionary[finite])
    expected = torch.tensor(finite)[exact.sort(dim=1, stable=True).indices]
    assert torch.equal(indices[:, :398], expected)
    assert (indices[:, 398:] == torch.tensor([9, 7])).all()


@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_topk_infinite_rows_go_by_index(metric, n):
    x, dictionary = torch.randn(n, 4), torch.randn(60, 4)
    x[:, 1], dictionary[3], dictionary[5, 2] = torch.inf, torch.nan, torch.inf
    indices, values = topk_codes(x, dictionary, 60, metric=metric)
    assert (indices == torch.tensor([*(i for i in range(60) if i != 3), 3])).all()
    assert not values.isfinite().any()
    assert torch.equal(topk_codes(x, dictionary, 5, metric=metric)[0], indices[:, :5])


@pytest.mark.parametrize("d", [1, 16, 33])
@pytest.mark.parametrize("num_codes", [17, 50, 3001])
def test_topk_few_rows_equals_float64_with_any_number_of_threads(num_codes, d):
    dictionary, bias = torch.randn(num_codes, d), torch.randn(num_codes)
    dictionary[num_codes // 2 :: 7], bias[num_codes // 2 :: 7] = dictionary[0].clone(), bias[0].clone()
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 7, 17):
            x = torch.randn(n, d)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for k in (1, num_codes // 8):
                    assert_exact(x, dictionary, k)
                    assert_exact(x, dictionary, k, "dot")
                    assert_exact(x, dictionary, k, "dot", bias)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_topk_few_rows_is_not_much_slower_than_plain_torch(instruction_set, metric, n):
    if instruction_set not in native.instruction_sets()[:1]:
        pytest.skip("plain PyTorch takes the best instruction set")
    x, dictionary = torch.randn(n, 256), torch.randn(16384, 256)
    scores = (lambda: x @ dictionary.T) if metric == "dot" else (lambda: -torch.cdist(x, dictionary))
    # Products of one or two rows take 1.2 times as long as plain PyTorch on an Intel Xeon.
    most = 1.4 if metric == "dot" and n <= 2 else 1.1
    found = slowdown(lambda: topk_codes(x, dictionary, 8, metric=metric), lambda: scores().topk(8), most)
    assert found <= most


@pytest.mark.slow
@pytest.mark.parametrize("k", [8, 32])
@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("name", hard_data.CASES)
def test_topk_hard_data_is_at_most_four_times_slower(name, metric, k):
    if name == "subnormal_rows" and subnormal_penalty() > 2:
        pytest.skip("this processor computes with subnormal numbers slowly")
    size = (2048, 512, 64)
    x, dictionary = torch.randn(*size[::2]), torch.randn(*size[1:])
    hard = hard_data.draw(name, *size)
    search = lambda case: topk_codes(*case, k, metric=metric)  # noqa: E731
    assert slowdown(lambda: search(hard), lambda: search((x, dictionary)), 4) <= 4


def softmax_case(n, num_codes, d, k):
    x, weight, bias = torch.randn(n, d), torch.randn(num_codes, d) / d**0.5, torch.randn(num_codes)
    return x, weight, bias, torch.randint(0, num_codes, (n, k)), torch.randn(n, k)


def formula(x, weight, bias, indices, grad):
    leaves = [each.requires_grad_() for each in (x.clone(), weight.clone(), bias.clone())]
    values = torch.nn.functional.linear(*leaves).softmax(1).gather(1, indices)
    return values.detach(), *torch.autograd.grad(values, leaves, grad.to(values.dtype))


def native_softmax(x, weight, bias, indices, grad):
    values, sums = torch.ops.dlvae.kept_softmax_fwd(x, weight, bias, indices)
    return values, *torch.ops.dlvae.kept_softmax_bwd(grad, values, sums, x, weight, bias, indices, True, True, True)


# Beside so many codes a superblock has 256 rows; beside 300 it has all.
SUPERBLOCKS = [(n, 8300, 3) for n in (255, 257, 513)]


@pytest.mark.parametrize("size", [*EDGES, *SUPERBLOCKS])
def test_kept_softmax_sizes_around_block_edges_equals_float64(size):
    x, weight, bias, indices, grad = softmax_case(*size, 4)
    actual = native_softmax(x, weight, bias, indices, grad)
    exact = formula(x.double(), weight.double(), bias.double(), indices, grad)
    for each in zip(actual, exact, formula(x, weight, bias, indices, grad), strict=True):
        assert_accurate(*each, floor=2e-6)


def test_topk_and_kept_softmax_any_number_of_threads_are_bitwise_reproducible(threads):
    torch.manual_seed(1)
    x, dictionary, bias = torch.randn(1001, 70), torch.randn(1100, 70), torch.randn(1100)
    cases = {"l2": None, "dot": bias}
    softmax = softmax_case(5003, 500, 40, 6)

    def run():
        found = [each for metric, b in cases.items() for each in topk_codes(x, dictionary, 40, metric=metric, bias=b)]
        return [*found, *native_softmax(*softmax)]

    actual = run()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(actual, run(), strict=True))


def test_topk_and_kept_softmax_invalid_arguments_raise_named_errors():
    x, dictionary, codes = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 1).long()
    ops = torch.ops.dlvae_native
    for message, call in (
        (r"expected k in \[1, K\] = \[1, 5\], got 6", lambda: ops.topk_codes(x, dictionary, 6, "l2", None)),
        ("expected metric to be 'l2' or 'dot', got 'cosine'", lambda: ops.topk_codes(x, dictionary, 1, "cosine", None)),
        (
            "expected x of D = 3 features as in dictionary, got 2",
            lambda: ops.topk_codes(x[:, :2], dictionary, 1, "l2", None),
        ),
        ("expected bias to be None", lambda: ops.topk_codes(x, dictionary, 1, "l2", torch.zeros(5))),
        (
            r"expected bias of shape \[K\] = \[5\], got \[4\]",
            lambda: ops.topk_codes(x, dictionary, 1, "dot", torch.zeros(4)),
        ),
        (
            "expected x of dtype float32, bfloat16 or float16, got Double",
            lambda: ops.topk_codes(x.double(), dictionary, 1, "l2", None),
        ),
        (r"expected weight of shape \[K, D\], got \[3\]", lambda: ops.kept_softmax_fwd(x, dictionary[0], None, codes)),
        (
            r"expected indices .* for the 2 vectors of x, got \[1, 1\]",
            lambda: ops.kept_softmax_fwd(x, dictionary, None, codes[:1]),
        ),
        ("expected indices of dtype int64, got Int", lambda: ops.kept_softmax_fwd(x, dictionary, None, codes.int())),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_topk_distances_of_centred_codes_are_those_of_differences():
    # Most codes lie around 1.5, where they are centred; one code and a vector near 0 are far from that centre.
    codes = torch.tensor([0.391, 1.515, 0.911, 0.4915, 1.5155, 1.4836, -0.03854416, 1.7116, 1.5087])[:, None]
    x = torch.linspace(-0.4, 0.4, 400)[:, None]
    with use_backend("native"):
        indices, distances = topk_codes(x, codes, 1)
    exact = (x.double() - codes.double()[indices[:, 0]]).square()
    torch.testing.assert_close(distances, exact.float(), rtol=2e-7, atol=1e-30)

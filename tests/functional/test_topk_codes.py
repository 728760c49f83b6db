from __future__ import annotations

import pytest
import torch

from dlvae_kernels import nearest_code, topk_codes, use_backend
from dlvae_kernels.testing import assert_accurate, assert_same_topk

from .cases import DTYPES, INTERPRETED, SIZES, layouts, vectors

OPS = ("topk_codes",)


@pytest.mark.small
@pytest.mark.every_isa
def test_topk_codes_four_atoms_by_hand(device):
    dictionary = torch.tensor([[5.0], [1.0], [3.0], [1.0]], device=device)
    indices, distances = topk_codes(torch.tensor([[0.0], [4.0]], device=device), dictionary, 3)
    assert indices.tolist() == [[1, 3, 2], [0, 2, 1]]
    assert distances.tolist() == [[1.0, 1.0, 9.0], [1.0, 1.0, 9.0]]


@pytest.mark.small
@pytest.mark.every_isa
def test_topk_codes_products_by_hand(device):
    dictionary = torch.tensor([[5.0], [1.0], [3.0], [1.0]], device=device)
    bias = torch.tensor([0.0, 4.0, 0.0, 4.0], device=device)
    x = torch.tensor([[1.0], [-2.0]], device=device)
    indices, products = topk_codes(x, dictionary, 3, metric="dot")
    assert indices.tolist() == [[0, 2, 1], [1, 3, 2]]
    assert products.tolist() == [[5.0, 3.0, 1.0], [-2.0, -2.0, -6.0]]
    indices, products = topk_codes(x, dictionary, 3, metric="dot", bias=bias)
    assert indices.tolist() == [[0, 1, 3], [1, 3, 2]]
    assert products.tolist() == [[5.0, 5.0, 5.0], [2.0, 2.0, -6.0]]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_topk_codes_any_size_and_dtype_equals_float64(device, size, dtype):
    n, num_atoms, d = size
    x, dictionary = vectors(n, d, device, dtype), vectors(num_atoms, d, device, dtype)
    for k in {1, min(7, num_atoms), num_atoms}:
        indices, distances = topk_codes(x, dictionary, k)
        assert indices.shape == distances.shape == (n, k)
        assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_same_topk(indices, distances, x, dictionary)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_topk_codes_products_match_float64(device, size, dtype):
    n, num_atoms, d = size
    x, dictionary = vectors(n, d, device, dtype), vectors(num_atoms, d, device, dtype)
    for k, bias in ((1, None), (min(7, num_atoms), vectors(1, num_atoms, device, dtype)[0]), (num_atoms, None)):
        indices, products = topk_codes(x, dictionary, k, metric="dot", bias=bias)
        assert indices.shape == products.shape == (n, k)
        assert products.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_same_topk(indices, products, x, dictionary, metric="dot", bias=bias)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_topk_codes_many_codes_match_float64(device, dtypes, metric):
    """More codes than the kernel for few codes accepts, some of them equal, and long ones beside short ones."""
    x, dictionary = vectors(70, 20, device, dtypes[0]), vectors(1100, 20, device, dtypes[1])
    dictionary[1000:1050] = dictionary[:50]
    dictionary[7] *= 1e3
    x[3] *= 1e-3
    indices, found = topk_codes(x, dictionary, 9, metric=metric)
    assert_same_topk(indices, found, x, dictionary, metric=metric)


@pytest.mark.parametrize("num_atoms", [64, 600])
def test_topk_codes_extremes_match_the_reference(device, num_atoms):
    """Against the reference: biases that mask, vectors far longer than the atoms, atoms whose square overflows."""
    x, dictionary = vectors(4, 16, device), vectors(num_atoms, 16, device)
    bias = torch.zeros(num_atoms, device=device)
    bias[::2] = torch.finfo(torch.float32).min
    long, tiny, unbounded = dictionary.clone(), 1e-17 * dictionary, x.clone()
    long[5] *= 1e19
    unbounded[:, 0] = torch.inf
    for inputs, atoms, options in (
        (x, dictionary, {"metric": "dot", "bias": bias}),
        (x, dictionary, {"metric": "dot", "bias": torch.where(bias < 0, -torch.inf, bias)}),
        (x, long, {"metric": "dot"}),
        (x, long, {}),
        (x, tiny, {}),
        (x, 0 * dictionary, {}),
        (1e-4 * x, 1e-2 * tiny, {}),
        (unbounded, dictionary, {"metric": "dot"}),
    ):
        indices, values = topk_codes(inputs, atoms, 4, **options)
        with use_backend("reference"):
            expected = topk_codes(inputs, atoms, 4, **options)
        torch.testing.assert_close(values, expected[1], equal_nan=True)
        # Tiny atoms tie in float32 for a much longer vector.
        assert atoms.abs().max() < 1e-10 or torch.equal(indices, expected[0])


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_topk_codes_all_codes_tie_orders_by_index(device, metric):
    x = vectors(9, 3, device)
    x[1] = 0
    indices, found = topk_codes(x, torch.ones(700, 3, device=device), 5, metric=metric)
    assert torch.equal(indices, torch.arange(5, device=device).expand(9, 5))
    assert torch.equal(found, found[:, :1].expand(9, 5))


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", layouts(2, 2, torch.device("cpu")))
def test_topk_codes_any_strides_match_float64(device, layout):
    x, dictionary = layouts(50, 12, device)[layout], vectors(24, 12, device)
    indices, distances = topk_codes(x, dictionary, 5)
    assert_same_topk(indices, distances, x, dictionary)
    bias = torch.randn(24, 2, device=device)[:, 0]
    indices, products = topk_codes(x, dictionary, 5, metric="dot", bias=bias)
    assert_same_topk(indices, products, x, dictionary, metric="dot", bias=bias)


def test_topk_codes_first_is_the_nearest(device):
    n, num_atoms = (100, 300) if INTERPRETED else (3000, 900)
    x, dictionary = vectors(n, 20, device), vectors(num_atoms, 20, device)
    assert torch.equal(topk_codes(x, dictionary, 4)[0][:, 0], nearest_code(x, dictionary, precision="exact"))


@pytest.mark.every_isa
def test_topk_codes_ties_are_ordered_by_index(device):
    dictionary = vectors(40, 33, device)
    dictionary = torch.cat([dictionary, dictionary, dictionary])
    x = torch.cat([vectors(100, 33, device), dictionary])
    # 4 cuts through the second group of three equal atoms.
    indices, distances = topk_codes(x, dictionary, 4)
    assert_same_topk(indices, distances, x, dictionary)
    assert (indices[:, 1] == indices[:, 0] + 40).all()
    assert (indices[:, 2] == indices[:, 0] + 80).all()
    assert (indices[:, 3] < 40).all()
    assert (distances[100:, :3] == 0).all()


def test_topk_codes_equal_products_are_ordered_by_index(device):
    dictionary = torch.cat([vectors(40, 33, device)] * 3)
    x, bias = vectors(100, 33, device), torch.cat([vectors(1, 40, device)[0]] * 3)
    indices, products = topk_codes(x, dictionary, 4, metric="dot", bias=bias)
    assert_same_topk(indices, products, x, dictionary, metric="dot", bias=bias)
    assert (indices[:, 1] == indices[:, 0] + 40).all()
    assert (indices[:, 2] == indices[:, 0] + 80).all()
    assert (products[:, 0] == products[:, 2]).all()
    indices, products = topk_codes(torch.zeros_like(x), dictionary, 50, metric="dot")
    assert torch.equal(indices, torch.arange(50, device=device).expand(100, 50))
    assert not products.any()


@pytest.mark.every_isa
def test_topk_codes_nan_follows_the_rules(device):
    nan = float("nan")
    dictionary = torch.tensor([[nan], [3.0], [nan], [1.0]], device=device)
    indices, _ = topk_codes(torch.tensor([[0.0], [nan]], device=device), dictionary, 4)
    assert indices[0].tolist() == [3, 1, 0, 2]
    assert sorted(indices[1].tolist()) == [0, 1, 2, 3]
    assert indices[1, 0] == 0


@pytest.mark.every_isa
def test_topk_codes_products_not_finite_follow_the_rules(device):
    nan, inf = float("nan"), float("inf")
    dictionary = torch.tensor([[nan], [3.0], [inf], [1.0], [-inf], [2.0]], device=device)
    bias = torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0, nan], device=device)
    x = torch.tensor([[1.0], [-1.0], [0.0], [nan], [inf]], device=device)
    indices, products = topk_codes(x, dictionary, 6, metric="dot", bias=bias)
    assert indices.tolist() == [
        [1, 3, 2, 4, 0, 5],
        [3, 1, 2, 4, 0, 5],
        [1, 3, 2, 4, 0, 5],
        [0, 1, 2, 3, 4, 5],
        [1, 2, 3, 4, 0, 5],
    ]
    expected = torch.tensor(
        [[3, 1, inf, -inf, nan, nan], [-1, -3, -inf, inf, nan, nan], [0, 0, *[nan] * 4], [nan] * 6], device=device
    )
    torch.testing.assert_close(products[:4], expected, rtol=0, atol=0, equal_nan=True)
    # A vector of NaN has NaN products with a single atom too, for which there are no ties.
    indices, products = topk_codes(x[3:4], dictionary[1:2], 1, metric="dot")
    assert indices.tolist() == [[0]]
    assert products.isnan().all()


def dense(x, dictionary, indices, bias):
    products = x @ dictionary.T
    return (products if bias is None else products + bias).gather(-1, indices)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES[:-1])
@pytest.mark.parametrize("biased", [False, True])
def test_topk_codes_gradients_match_the_dense_formula(device, biased, dtype):
    inputs = [
        vectors(60, 12, device, dtype),
        vectors(30, 12, device, dtype),
        *[vectors(1, 30, device, dtype)[0]] * biased,
    ]
    grad = vectors(60, 5, device)
    indices = topk_codes(*inputs[:2], 5, metric="dot", bias=inputs[2] if biased else None)[0]

    def run(function, to):
        x, dictionary, *rest = leaves = [each.to(to).requires_grad_() for each in inputs]
        out = function(x, dictionary, rest[0] if biased else None)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    actual = run(lambda x, atoms, bias: topk_codes(x, atoms, 5, metric="dot", bias=bias)[1], dtype)
    exact, expression = (
        run(lambda x, atoms, bias: dense(x, atoms, indices, bias), to) for to in (torch.float64, dtype)
    )
    for each in zip(actual, exact, expression, strict=True):
        assert_accurate(*each, floor=1e-6 if dtype == torch.float32 else 4e-3)
    assert {each.dtype for each in actual[1:]} == {dtype}


@pytest.mark.every_isa
def test_topk_codes_gradients_are_only_those_needed(device):
    x, dictionary, bias = vectors(8, 3, device), vectors(5, 3, device), vectors(1, 5, device)[0]
    leaves = [each.requires_grad_() for each in (x, dictionary, bias)]
    whole = torch.autograd.grad(topk_codes(x, dictionary, 2, metric="dot", bias=bias)[1].sum(), leaves)
    for i, grad in enumerate(whole):
        arguments = [each if i == j else each.detach() for j, each in enumerate(leaves)]
        indices, products = topk_codes(*arguments[:2], 2, metric="dot", bias=arguments[2])
        assert not indices.requires_grad
        assert torch.equal(torch.autograd.grad(products.sum(), leaves[i])[0], grad)
    assert not topk_codes(x, dictionary, 2)[1].requires_grad
    with torch.no_grad():
        assert not topk_codes(x, dictionary, 2, metric="dot", bias=bias)[1].requires_grad


def test_topk_codes_half_precision_beside_float32_keeps_dtypes(device):
    x, dictionary, bias = vectors(9, 4, device), vectors(6, 4, device), vectors(1, 6, device)[0].requires_grad_()
    leaves = x.half().requires_grad_(), dictionary.requires_grad_()
    _, products = topk_codes(*leaves, 2, metric="dot", bias=bias)
    grads = torch.autograd.grad(products.sum(), (*leaves, bias))
    assert [each.dtype for each in grads] == [torch.float16, torch.float32, torch.float32]
    assert topk_codes(x.half(), dictionary.half(), 2, metric="dot", bias=bias)[1].dtype == torch.float32


@pytest.mark.float64
def test_topk_codes_gradcheck_passes(device):
    inputs = [vectors(*shape, device, torch.float64).requires_grad_() for shape in ((4, 3), (7, 3), (1, 7))]
    assert torch.autograd.gradcheck(lambda x, atoms, b: topk_codes(x, atoms, 3, metric="dot", bias=b[0])[1], inputs)


@pytest.mark.large
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_topk_codes_repeated_call_is_bitwise_reproducible(device, metric):
    torch.use_deterministic_algorithms(False)
    leaves = [vectors(n, 32, device).requires_grad_() for n in (1000, 300)]
    found = []
    for _ in range(2):
        indices, values = topk_codes(*leaves, 20, metric=metric)
        gradients = torch.autograd.grad(values.sin().sum(), leaves) if metric == "dot" else ()
        found.append((indices, values, *gradients))
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_topk_codes_opcheck_passes(device, metric):
    x, bias = layouts(20, 6, device)["channel_first"], torch.ones(5, device=device) if metric == "dot" else None
    torch.library.opcheck(torch.ops.dlvae.topk_codes, (x, vectors(5, 6, device), 3, metric, bias))


def test_topk_codes_compiled_whole_matches_eager(device):
    x, dictionary = vectors(40, 6, device), vectors(9, 6, device)
    compiled = torch.compile(topk_codes, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, dictionary, 4)[0], topk_codes(x, dictionary, 4)[0])
    leaves = [x.requires_grad_(), dictionary.requires_grad_(), torch.ones(9, device=device, requires_grad=True)]
    outs = [f(*leaves[:2], 4, metric="dot", bias=leaves[2]) for f in (compiled, topk_codes)]
    grads = [torch.autograd.grad(products.square().sum(), leaves) for _, products in outs]
    for actual, expected in zip((*outs[0], *grads[0]), (*outs[1], *grads[1]), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("k", [0, -1, 6, 2.0])
def test_topk_codes_bad_k_raises(k):
    with pytest.raises(ValueError, match=rf"expected k to be an integer in \[1, 5\], got {k}"):
        topk_codes(torch.zeros(2, 3), torch.zeros(5, 3), k)


def test_topk_codes_bad_input_raises():
    with pytest.raises(ValueError, match=r"expected dictionary of shape .*, got \(0, 3\)"):
        topk_codes(torch.zeros(2, 3), torch.zeros(0, 3), 1)
    with pytest.raises(ValueError, match=r"expected metric to be one of 'l2', 'dot', got 'cosine'"):
        topk_codes(torch.zeros(2, 3), torch.zeros(5, 3), 1, metric="cosine")


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(4), r"expected bias of shape \[5\], with the K of dictionary, got \(4,\)"),
        (torch.zeros(5, 1), r"expected bias of shape .*, got \(5, 1\)"),
        (torch.zeros(5, device="meta"), r"expected bias on the device of dictionary, cpu, got meta"),
        (torch.zeros(5).double(), r"expected bias of dtype .*, got torch.float64"),
        (torch.zeros(5).half(), r"expected bias of dtype .*, got torch.float16"),
        (torch.zeros(5).long(), r"expected bias of dtype .*, got torch.int64"),
    ],
)
def test_topk_codes_bad_bias_raises(bias, message):
    with pytest.raises(ValueError, match=message):
        topk_codes(torch.zeros(2, 3), torch.zeros(5, 3), 1, metric="dot", bias=bias)


def test_topk_codes_bias_with_distances_raises():
    with pytest.raises(ValueError, match=r"expected bias to be None with metric='l2', got shape \(5,\)"):
        topk_codes(torch.zeros(2, 3), torch.zeros(5, 3), 1, bias=torch.zeros(5))

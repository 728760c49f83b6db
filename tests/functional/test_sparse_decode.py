from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from dlvae_kernels import sparse_decode
from dlvae_kernels.backends.reference import sparse_decode_bwd
from dlvae_kernels.testing import assert_accurate

from .cases import DTYPES, rows

OPS = ("sparse_decode_fwd", "sparse_decode_bwd")
WAYS = {"triton": ("-sparse", "-dense")}


@pytest.fixture(autouse=True)
def _way(request, monkeypatch):
    *_, way = getattr(request.node, "callspec", SimpleNamespace(params={})).params.get("device", ("",))
    if way:
        module = import_module("dlvae_kernels.backends.triton.sparse_decode")
        monkeypatch.setattr(module, "suits", lambda *sizes: way == "-dense")


def case(n, num_atoms, d, k, device, dtype=torch.float32):
    values = rows(n, k, device, dtype)
    indices = torch.randint(0, num_atoms, (n, k), device=device)
    return values, indices, rows(num_atoms, d, device, dtype)


@pytest.mark.small
@pytest.mark.every_isa
def test_sparse_decode_three_atoms_by_hand(device):
    values = torch.tensor([[2.0, -1.0], [1.0, 3.0]], device=device, requires_grad=True)
    indices = torch.tensor([[0, 2], [1, 1]], device=device)
    dictionary = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 7.0]], device=device, requires_grad=True)
    out = sparse_decode(values, indices, dictionary)
    assert out.tolist() == [[-3, -7], [0, 4]]
    (out * torch.tensor([[1.0, 1.0], [10.0, 100.0]], device=device)).sum().backward()
    assert values.grad.tolist() == [[1, 12], [100, 100]]
    assert dictionary.grad.tolist() == [[2, 2], [40, 400], [-1, -1]]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size",
    [
        (0, 5, 4, 2),
        (1, 1, 1, 1),
        (63, 17, 3, 17),
        pytest.param((507, 129, 64, 20), marks=pytest.mark.large),
        (300, 1000, 9, 3),
    ],
)
def test_sparse_decode_any_size_and_dtype_equals_float64(device, size, dtype):
    values, indices, dictionary = case(*size, device, dtype)
    grad = rows(size[0], size[2], device, dtype)

    def run(function, to):
        inputs = values.to(to).requires_grad_(), dictionary.to(to).requires_grad_()
        out = function(inputs[0], indices, inputs[1])
        return out.detach(), *torch.autograd.grad(out, inputs, grad.to(to))

    def formula(v, i, atoms):
        return (v[..., None] * atoms[i]).sum(-2)

    actual, exact, expression = run(sparse_decode, dtype), run(formula, torch.float64), run(formula, dtype)
    for each in zip(actual, exact, expression, strict=True):
        assert each[0].dtype == dtype
        assert_accurate(*each, floor=1e-6 if dtype in (torch.float32, torch.float64) else 4e-3)


@pytest.mark.every_isa
def test_sparse_decode_any_rank_and_strides_match_the_formula(device):
    values = torch.randn(2, 4, 3, device=device).transpose(1, 2).requires_grad_()
    indices = torch.randint(0, 9, (2, 4, 3), device=device).transpose(1, 2)
    dictionary = torch.randn(6, 9, device=device).T.requires_grad_()
    out = sparse_decode(values, indices, dictionary)
    expected = (values[..., None] * dictionary[indices]).sum(-2)
    torch.testing.assert_close(out, expected)
    grad = torch.randn(2, 6, 3, device=device).transpose(1, 2)
    grads = [torch.autograd.grad(o, (values, dictionary), grad) for o in (out, expected)]
    torch.testing.assert_close(*grads)


def test_sparse_decode_mixed_dtypes_give_the_wider(device):
    values, indices, dictionary = case(5, 7, 3, 2, device)
    assert sparse_decode(values.half(), indices, dictionary).dtype == torch.float32
    assert sparse_decode(values, indices, dictionary.bfloat16()).dtype == torch.float32


@pytest.mark.float64
def test_sparse_decode_gradcheck_passes(device):
    values, indices, dictionary = case(5, 6, 3, 4, device, torch.float64)
    inputs = values.requires_grad_(), dictionary.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, a: sparse_decode(v, indices, a), inputs)


@pytest.mark.every_isa
@pytest.mark.large
def test_sparse_decode_gradients_of_a_repeated_call_are_bitwise_reproducible(device):
    torch.use_deterministic_algorithms(False)
    values, indices, dictionary = case(3000, 40, 16, 8, device)
    arguments = (rows(3000, 16, device), values, indices, dictionary, True, True)
    first, second = (torch.ops.dlvae.sparse_decode_bwd(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.every_isa
def test_sparse_decode_values_not_finite_stay_in_their_vectors_and_atoms(device):
    values, indices, dictionary = case(70, 200, 20, 3, device)
    grad = rows(70, 20, device)
    indices[indices == 5] = 6
    indices[3] = torch.tensor([5, 1, 2])
    expected = sparse_decode(values, indices, dictionary)
    dictionary[5, 7] = float("nan")
    out = sparse_decode(values, indices, dictionary)
    assert out[3, 7].isnan()
    expected[3, 7] = out[3, 7] = 0
    torch.testing.assert_close(out, expected)
    grad[3, 8] = float("inf")
    grad_values, grad_dictionary = torch.ops.dlvae.sparse_decode_bwd(grad, values, indices, dictionary, True, True)
    assert not grad_values[3].isfinite().any()
    assert grad_values[torch.arange(70, device=device) != 3].isfinite().all()
    lost = grad_dictionary.isfinite().logical_not()
    assert lost[[5, 1, 2], 8].all()
    assert lost.sum() == 3


@pytest.mark.parametrize(("num_atoms", "gathers"), [(100, False), (1000, True)])
def test_sparse_decode_reference_gathers_only_where_atoms_are_many(num_atoms, gathers, monkeypatch):
    module = sys.modules[sparse_decode_bwd.__module__]
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 3 * num_atoms)  # several chunks
    values, indices, dictionary = case(50, num_atoms, 4, 3, torch.device("cpu"))
    grad = rows(50, 4, torch.device("cpu"))
    taken = []
    for name in ("_products", "_products_by_gather", "_sums", "_sums_by_segment"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, f=original: taken.append(n) or f(*args))
    grad_values, grad_dictionary = sparse_decode_bwd(grad, values, indices, dictionary, True, True)
    assert taken == (["_products_by_gather", "_sums_by_segment"] if gathers else ["_products", "_sums"])
    torch.testing.assert_close(grad_values, (grad[:, None] * dictionary[indices]).sum(2))
    dense = torch.zeros(50, num_atoms).scatter_add(1, indices, values)
    torch.testing.assert_close(grad_dictionary, dense.T @ grad)


@pytest.mark.every_isa
def test_sparse_decode_autocast_rounds_no_gradient(device):
    values, indices, dictionary = case(40, 30, 16, 5, device)
    arguments = (rows(40, 16, device), values, indices, dictionary, True, True)
    expected = torch.ops.dlvae.sparse_decode_bwd(*arguments)
    with torch.autocast(device.type, torch.bfloat16):
        actual = torch.ops.dlvae.sparse_decode_bwd(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_sparse_decode_opcheck_and_compile_pass(device):
    values, indices, dictionary = case(6, 5, 3, 2, device)
    torch.library.opcheck(torch.ops.dlvae.sparse_decode_fwd, (values, indices, dictionary))
    for needs in ((True, True), (True, False), (False, True)):
        args = (rows(6, 3, device), values, indices, dictionary, *needs)
        torch.library.opcheck(torch.ops.dlvae.sparse_decode_bwd, args)
    inputs = values.requires_grad_(), dictionary.requires_grad_()
    compiled = torch.compile(sparse_decode, fullgraph=True, backend="aot_eager")
    outs = [function(values, indices, dictionary) for function in (compiled, sparse_decode)]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("values", "indices", "message"),
    [
        (
            torch.ones(2, 3),
            torch.zeros(2, 2).long(),
            r"expected values and indices of one shape .*, got \(2, 3\) and \(2, 2\)",
        ),
        (torch.ones(2, 0), torch.zeros(2, 0).long(), r"of one shape \[..., k\] with k >= 1, got \(2, 0\)"),
        (torch.ones(2, 1), torch.full((2, 1), 4), r"expected indices in \[0, 4\), got 4"),
        (torch.ones(2, 1), torch.full((2, 1), -2), r"expected indices in \[0, 4\), got -2"),
        (torch.ones(2, 1).long(), torch.zeros(2, 1).long(), r"expected values of dtype .*, got torch.int64"),
        (torch.ones(2, 1), torch.zeros(2, 1), r"expected indices of dtype .*, got torch.float32"),
    ],
)
def test_sparse_decode_bad_input_raises(values, indices, message):
    with pytest.raises(ValueError, match=message):
        sparse_decode(values, indices, torch.zeros(4, 2))

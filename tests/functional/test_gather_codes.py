from __future__ import annotations

import pytest
import torch

from dlvae_kernels import gather_codes
from dlvae_kernels.testing import assert_accurate

from .cases import DTYPES, vectors

OPS = ("gather_codes_fwd", "gather_codes_bwd")


@pytest.mark.small
@pytest.mark.every_isa
def test_gather_codes_two_codes_by_hand(device):
    codebook = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device, requires_grad=True)
    out = gather_codes(codebook, torch.tensor([[1, 0], [1, 1]], device=device))
    assert out.tolist() == [[[3, 4], [1, 2]], [[3, 4], [3, 4]]]
    (out * torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]], device=device)).sum().backward()
    assert codebook.grad.tolist() == [[10, 10], [1101, 1101]]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(0, 5, 4), (1, 1, 1), (507, 129, 64), (3000, 3, 7)])
def test_gather_codes_any_dtype_values_and_gradient_match_float64(device, size, dtype):
    n, k, d = size
    codebook = vectors(k, d, device, dtype).requires_grad_()
    indices, grad = torch.randint(0, k, (n,), device=device), vectors(n, d, device, dtype)
    out = gather_codes(codebook, indices)
    assert torch.equal(out, codebook[indices])
    out.backward(grad)
    assert codebook.grad.dtype == dtype
    exact = torch.zeros(k, d, dtype=torch.float64, device=device).index_add_(0, indices, grad.double())
    expression = torch.zeros(k, d, dtype=dtype, device=device).index_add_(0, indices, grad)
    assert_accurate(codebook.grad, exact, expression)


def test_gather_codes_one_index_returns_a_copy(device):
    codebook = vectors(4, 3, device)
    code = gather_codes(codebook, torch.tensor(1, device=device))
    expected = codebook[1].clone()
    codebook.zero_()
    assert torch.equal(code, expected)
    torch.library.opcheck(torch.ops.dlvae.gather_codes_fwd, (codebook, torch.tensor(1, device=device)))


@pytest.mark.every_isa
def test_gather_codes_strided_gradient_is_summed(device):
    codebook = vectors(9, 6, device).requires_grad_()
    indices = torch.randint(0, 9, (2, 5), device=device)
    grad = torch.randn(2, 6, 5, device=device).transpose(1, 2)
    gather_codes(codebook, indices).backward(grad)
    expected = torch.zeros(9, 6, device=device).index_add_(0, indices.flatten(), grad.reshape(-1, 6))
    torch.testing.assert_close(codebook.grad, expected)


@pytest.mark.float64
def test_gather_codes_gradcheck_passes(device):
    indices = torch.tensor([[0, 2, 2], [1, 0, 2]], device=device)
    codebook = vectors(4, 3, device, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: gather_codes(c, indices), codebook)


@pytest.mark.every_isa
@pytest.mark.large
def test_gather_codes_gradient_repeated_call_is_bitwise_reproducible(device):
    torch.use_deterministic_algorithms(False)
    indices, grad = torch.randint(0, 7, (5000,), device=device), vectors(5000, 16, device)
    first, second = (torch.ops.dlvae.gather_codes_bwd(grad, indices, 7, 1) for _ in range(2))
    assert torch.equal(first, second)


def test_gather_codes_opcheck_and_compile_pass(device):
    codebook, indices = vectors(5, 3, device), torch.tensor([[0, 4], [1, 1]], device=device)
    torch.library.opcheck(torch.ops.dlvae.gather_codes_fwd, (codebook, indices))
    torch.library.opcheck(torch.ops.dlvae.gather_codes_bwd, (vectors(4, 3, device), indices.flatten(), 5, 1))
    codebook.requires_grad_()
    compiled = torch.compile(gather_codes, fullgraph=True, backend="aot_eager")
    compiled(codebook, indices).sum().backward()
    assert codebook.grad[:, 0].tolist() == [1, 2, 0, 0, 1]


@pytest.mark.parametrize(
    ("codebook", "indices", "message"),
    [
        (torch.zeros(3, 2), torch.tensor([3]), r"expected indices in \[-1, 3\) \(-1 stands for no code\), got 3"),
        (torch.zeros(3, 2), torch.tensor([-2]), r"expected indices in \[-1, 3\) .*, got -2"),
        (torch.zeros(3, 2), torch.tensor([0], dtype=torch.int32), r"expected indices of dtype .*, got torch.int32"),
        (torch.zeros(0, 2), torch.tensor([0]), r"expected codebook of shape .*, got \(0, 2\)"),
        (
            torch.zeros(3, 2),
            torch.zeros(1, dtype=torch.int64, device="meta"),
            r"expected indices on the device of .*, got meta",
        ),
    ],
)
def test_gather_codes_bad_input_raises(codebook, indices, message):
    with pytest.raises(ValueError, match=message):
        gather_codes(codebook, indices)

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from dlvae_kernels import bit_entropy
from tests.allocations import Allocations


def dense(logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both results in float64, from the probabilities of all codes."""
    logits = logits.double().flatten(0, -2)
    d = logits.shape[1]
    codes = ((torch.arange(2**d)[:, None] >> torch.arange(d - 1, -1, -1)) & 1).double()
    log_p = torch.stack([torch.nn.functional.logsigmoid(sign * logits) for sign in (-1, 1)])
    log_p = log_p[0] @ (1 - codes).T + log_p[1] @ codes.T
    entropies = -(log_p.exp() * log_p).sum(1)
    valid = torch.ones(len(logits), dtype=torch.bool) if mask is None else mask.flatten()
    return torch.where(valid, entropies, 0), log_p.exp()[valid].sum(0) / valid.sum().clamp(min=1)


def total(out: tuple[Tensor, Tensor]) -> Tensor:
    """A scalar with a different slope for every element of both results."""
    entropies, p = out
    return (entropies.flatten() * torch.linspace(1, 2, entropies.numel())).sum() + (
        p * (p + 1e-30).log() * torch.linspace(1, 3, len(p))
    ).sum()


@pytest.mark.small
def test_bit_entropy_by_hand():
    entropies, p = bit_entropy(torch.tensor([[0.0, 50.0], [math.log(3), -50.0]]))
    torch.testing.assert_close(entropies, torch.tensor([math.log(2), 2 * math.log(2) - 0.75 * math.log(3)]))
    # The first bit is the most significant.
    torch.testing.assert_close(p, torch.tensor([0.25, 0.5, 0.75, 0.5]) / 2)


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("d", [1, 2, 5, 10])
def test_bit_entropy_values_and_gradients_match_float64(monkeypatch, d, masked, scale):
    # Several chunks of two vectors and one of one.
    module = importlib.import_module("dlvae_kernels.functional.bit_entropy")
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 2 << (d + 1) // 2)
    logits = (scale * torch.randn(3, 7, d)).requires_grad_()
    mask = torch.rand(3, 7) < 0.6 if masked else None
    found, expected = bit_entropy(logits, mask), dense(logits, mask)
    torch.testing.assert_close(found.entropies.double().flatten(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean_probabilities.double(), expected[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(total(found), logits)[0],
        torch.autograd.grad(total(expected), logits)[0],
        rtol=1e-4,
        atol=1e-5,
    )


def test_bit_entropy_gradcheck_in_float64():
    logits, mask = (
        torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
        torch.tensor([True, False, True, True, True]),
    )
    assert torch.autograd.gradcheck(lambda x: (*bit_entropy(x), *bit_entropy(x, mask)), logits)


@pytest.mark.parametrize("n", [4_800, 65_536])
def test_bit_entropy_of_14_bits_allocates_no_n_by_k_matrix(n):
    logits = torch.randn(n, 14, requires_grad=True)
    with Allocations() as found:
        total(bit_entropy(logits)).backward()
    # A chunk of the probabilities of half of the bits, where the dense matrix has n * 16384 elements.
    assert found.elements <= 2**20, found.operation


def test_bit_entropy_saturated_and_infinite_logits_have_finite_results():
    logits = torch.tensor([[torch.inf, -torch.inf], [1e30, -1e30]], requires_grad=True)
    entropies, p = bit_entropy(logits)
    assert float(entropies.detach().max()) < 1e-40
    assert p.tolist() == [0, 0, 1, 0]
    (grad,) = torch.autograd.grad(total((entropies, p)), logits)
    assert float(grad.abs().max()) < 1e-40


def test_bit_entropy_nan_reaches_the_results_unless_masked():
    logits = torch.tensor([[torch.nan, 1.0], [1.0, 2.0]], requires_grad=True)
    entropies, p = bit_entropy(logits)
    assert entropies.isnan().tolist() == [True, False]
    assert p.isnan().all()
    entropies, p = bit_entropy(logits, torch.tensor([False, True]))
    torch.testing.assert_close(p, bit_entropy(logits[1:]).mean_probabilities)
    (grad,) = torch.autograd.grad(total((entropies, p)), logits)
    assert grad[0].tolist() == [0, 0]
    assert grad.isfinite().all()


def test_bit_entropy_without_valid_vectors_is_zero():
    for out in (bit_entropy(torch.empty(0, 3)), bit_entropy(torch.randn(4, 3), torch.zeros(4, dtype=torch.bool))):
        assert not out.entropies.any()
        assert out.mean_probabilities.tolist() == [0] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bit_entropy_half_precision_and_autocast_compute_in_float32(dtype):
    logits = torch.randn(40, 6).to(dtype)
    expected = bit_entropy(logits.float())
    with torch.autocast("cpu", dtype):
        found = bit_entropy(logits)
    for actual, value in zip(found, expected, strict=True):
        assert torch.equal(actual, value)


def test_bit_entropy_compiled_whole_and_exported_match_eager():
    class Model(torch.nn.Module):
        def forward(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return bit_entropy(logits, mask)

    mask = torch.rand(20) < 0.7
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Model(), (torch.randn(20, 5), mask)).module()
    logits = torch.randn(20, 5, requires_grad=True)
    results = []
    for function in (bit_entropy, compiled, exported):
        out = function(logits, mask)
        results.append((*out, torch.autograd.grad(total(out), logits)[0]))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected)


def test_bit_entropy_transforms_of_torch_func_match_autograd():
    logits = torch.randn(3, 6, 4)
    found = torch.func.vmap(torch.func.grad(lambda x: total(bit_entropy(x))))(logits)
    for actual, x in zip(found, logits, strict=True):
        x = x.clone().requires_grad_()
        torch.testing.assert_close(actual, torch.autograd.grad(total(bit_entropy(x)), x)[0])


def test_bit_entropy_second_derivative_raises():
    logits = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(bit_entropy(logits).mean_probabilities.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="bit_entropy has no second derivative"):
        grad.sum().backward()


def test_bit_entropy_forward_mode_raises():
    logits = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match="bit_entropy has no forward-mode derivative; use reverse mode"):
        torch.func.jvp(lambda x: bit_entropy(x).mean_probabilities, (logits,), (logits,))


def test_bit_entropy_repeated_runs_are_bitwise_equal():
    logits = torch.randn(500, 9, requires_grad=True)
    runs = []
    for _ in range(2):
        out = bit_entropy(logits)
        runs.append((*out, torch.autograd.grad(total(out), logits)[0]))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        (torch.zeros(()), None, r"expected logits of shape \[..., d\] with 1 <= d <= 24, got \(\)"),
        (torch.zeros(2, 25), None, r"expected logits of shape .*, got \(2, 25\)"),
        (torch.zeros(2, 3).int(), None, r"expected logits of dtype .*, got torch.int32"),
        (torch.zeros(2, 3), torch.ones(3).bool(), r"expected mask of shape \(2,\) .*, got \(3,\)"),
        (torch.zeros(2, 3), torch.ones(2), r"expected mask of .* dtype torch.bool, got .* torch.float32"),
    ],
)
def test_bit_entropy_bad_inputs_raise(logits, mask, message):
    with pytest.raises(ValueError, match=message):
        bit_entropy(logits, mask)

"""Sums of very many vectors or atoms: their error does not grow with the number of additions."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from dlvae_kernels import gather_codes, sparse_decode
from dlvae_kernels.functional import ema_statistics

from .cases import INTERPRETED

OPS = ("ema_statistics", "gather_codes_bwd", "vector_quantize_bwd", "sparse_decode_fwd", "sparse_decode_bwd")
# Triton's interpreter and the CUDA emulator take minutes for a million vectors, so fewer are used there;
# tests/backends/test_triton_sums.py tests the kernels that need more.
IS_EMULATED = "DLVAE_EMULATED_CUDA" in os.environ
NUM_VECTORS = 2**12 if INTERPRETED else 2**17 if IS_EMULATED else 2**20
# In a float32 chain of equal terms all rounding errors have one sign; their size depends on the value.
VALUES = (1.1, 1.7, 1.999)
ERROR = 2e-6


def equal_vectors(value: float, device: torch.device) -> Tensor:
    return torch.full((NUM_VECTORS, 2), value, device=device)


def relative_error(actual: Tensor, exact: float) -> float:
    return float(((actual.double() - exact) / exact).abs().max())


@pytest.mark.every_isa
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("layout", ["vectors", "map", "half"])
def test_ema_statistics_equal_vectors_error_is_bounded(device, layout, value):
    x = equal_vectors(value, device)
    if layout == "map":
        x = x.view(4, -1, 2).transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "half":
        x = x.half()
    statistics = ema_statistics(x, torch.ones(x.shape[:-1], dtype=torch.int64, device=device), 3)
    assert relative_error(statistics[1, :-1], float(x.flatten()[0]) * NUM_VECTORS) <= ERROR
    assert statistics[:, -1].tolist() == [0, NUM_VECTORS, 0]
    assert not statistics[[0, 2]].any()


@pytest.mark.every_isa
@pytest.mark.parametrize("num_unused", [0, 50])
def test_ema_statistics_counts_around_a_chain_sums_are_exact(device, num_unused):
    counts = torch.tensor([0, 127, 128, 129, 0, 1, 255, 256, 257, 700] + [0] * num_unused)
    indices = torch.arange(len(counts)).repeat_interleave(counts)
    indices = indices[torch.randperm(len(indices))].to(device)
    x = torch.randint(-8, 9, (len(indices), 3), device=device).float()
    exact = torch.zeros(len(counts), 3, dtype=torch.float64, device=device).index_add_(0, indices, x.double())
    statistics = ema_statistics(x, indices, len(counts))
    assert torch.equal(statistics[:, :-1].double(), exact)
    assert torch.equal(statistics[:, -1].long().cpu(), counts)


@pytest.mark.every_isa
@pytest.mark.skipif(INTERPRETED or IS_EMULATED, reason="2**24 vectors take hours in a simulation")
def test_ema_statistics_more_than_2_to_24_ones_are_counted(device):
    n = 2**24 + 1000
    statistics = ema_statistics(torch.ones(n, 1, device=device), torch.zeros(n, dtype=torch.int64, device=device), 1)
    assert statistics[0, 1] == n
    assert relative_error(statistics[0, 0], n) <= 1e-6


@pytest.mark.every_isa
@pytest.mark.parametrize("value", VALUES)
def test_codebook_gradient_equal_vectors_error_is_bounded(device, value):
    grad, indices = equal_vectors(value, device), torch.ones(NUM_VECTORS, dtype=torch.int64, device=device)
    codebook = torch.zeros(3, 2, device=device, requires_grad=True)
    gather_codes(codebook, indices).backward(grad)
    exact = float(grad[0, 0]) * NUM_VECTORS
    assert relative_error(codebook.grad[1], exact) <= ERROR
    one = torch.ones((), device=device)
    arguments = (grad, one, one, grad, indices, 3, 1, False, True)
    _, grad_codebook = torch.ops.dlvae.vector_quantize_bwd(*arguments)
    # The slope of half an error, 4 / numel, is rounded to float32.
    assert relative_error(grad_codebook[1], exact * 4 / grad.numel()) <= ERROR + 2**-23


@pytest.mark.every_isa
# The reference multiplies by dense coefficients if there are few atoms, and sorts if there are many.
@pytest.mark.parametrize("num_atoms", [3, 1000])
@pytest.mark.parametrize("value", VALUES)
def test_dictionary_gradient_equal_vectors_error_is_bounded(device, value, num_atoms):
    grad = equal_vectors(value, device)[: NUM_VECTORS // 4]
    indices = torch.tensor([0, 1, 0, 2], device=device).expand(len(grad), 4)
    dictionary = torch.zeros(num_atoms, 2, device=device, requires_grad=True)
    sparse_decode(torch.ones(indices.shape, device=device), indices, dictionary).backward(grad)
    exact = float(grad[0, 0]) * len(grad)
    assert relative_error(dictionary.grad[:3], torch.tensor([[2], [1], [1]], device=device) * exact) <= ERROR
    assert not dictionary.grad[3:].any()


@pytest.mark.parametrize("value", VALUES)
def test_sparse_decode_many_equal_atoms_error_is_bounded(device, value):
    k = 2**9 if INTERPRETED else 2**14
    values, indices = torch.full((3, k), value, device=device), torch.arange(k, device=device).expand(3, k) % 2000
    out = sparse_decode(values, indices, torch.ones(2000, 2, device=device))
    assert relative_error(out, float(values[0, 0]) * k) <= ERROR


@pytest.mark.every_isa
def test_ema_statistics_random_vectors_error_is_that_of_a_pairwise_sum(device):
    n = NUM_VECTORS // 4
    x = torch.rand(n, 32, device=device)
    exact = x.double().sum(0)
    chains = x.view(-1, 128, 32)
    pairwise = torch.zeros_like(chains[:, 0])
    for i in range(128):
        pairwise += chains[:, i]
    while len(pairwise) > 1:
        pairwise = pairwise[::2] + pairwise[1::2]
    statistics = ema_statistics(x, torch.zeros(n, dtype=torch.int64, device=device), 1)
    errors = [(each.double() - exact).square().mean().sqrt() for each in (statistics[0, :-1], pairwise[0])]
    assert errors[0] <= 1.5 * errors[1]

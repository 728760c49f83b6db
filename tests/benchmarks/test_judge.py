"""A fast wrong answer must be seen."""

from __future__ import annotations

import pytest
import torch

from benchmarks import judge
from benchmarks.entry import TOLERANCES, Size, draw
from dlvae_kernels.testing import exact_distances

SIZE = Size("test", 2_000, 40, 6, 4)
FLOAT32 = TOLERANCES["float32"]


@pytest.fixture
def inputs():
    return draw(SIZE, torch.device("cpu"))


@pytest.fixture
def indices(inputs):
    return exact_distances(inputs.x, inputs.codes).argmin(1)


def spoiled(indices):
    """One index in a thousand off."""
    wrong = indices.clone()
    wrong[::1000] = (wrong[::1000] + 1) % SIZE.k
    return wrong


def test_right_indices_pass(inputs, indices):
    verdict = judge.nearest(inputs, (indices,), None, FLOAT32)
    assert (verdict.differing, verdict.wrong) == (0, False)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_one_index_in_a_thousand_is_seen(inputs, indices, precision):
    verdict = judge.nearest(inputs, (spoiled(indices),), None, TOLERANCES[precision])
    assert verdict.differing == pytest.approx(0.001)
    assert verdict.wrong


@pytest.mark.parametrize("off", [-1, SIZE.k])
def test_an_index_out_of_range_is_wrong(inputs, indices, off):
    indices[7] = off
    assert judge.nearest(inputs, (indices,), None, FLOAT32).wrong


def test_a_near_tie_passes_and_is_counted(inputs, indices):
    codes = inputs.codes.clone()
    codes[1] = codes[0] * (1 + 2**-23)
    near = draw(SIZE, torch.device("cpu"))
    near.codes.copy_(codes)
    exact = exact_distances(near.x, codes).argmin(1)
    swapped = torch.where(exact <= 1, 1 - exact, exact)
    verdict = judge.nearest(near, (swapped,), None, FLOAT32)
    assert verdict.differing == pytest.approx(float((exact <= 1).double().mean()))
    assert 0 < verdict.differing < 1
    assert not verdict.wrong


def test_topk(inputs):
    distances, indices = exact_distances(inputs.x, inputs.codes).topk(SIZE.kept, largest=False)
    assert judge.topk(inputs, (indices, distances.float()), None, FLOAT32).differing == 0
    assert not judge.topk(inputs, (indices, distances.float()), None, FLOAT32).wrong
    swapped = indices.clone()
    swapped[::1000, :2] = indices[::1000, :2].flip(1)
    assert judge.topk(inputs, (swapped, distances), None, FLOAT32).wrong
    repeated = indices.clone()
    repeated[0, 1] = indices[0, 0]
    assert judge.topk(inputs, (repeated, distances), None, FLOAT32).wrong
    assert judge.topk(inputs, (indices, distances * 1.001), None, FLOAT32).wrong
    assert judge.topk(inputs, (indices, distances * torch.nan), None, FLOAT32).wrong


def test_quantized(inputs, indices):
    x, codes = (each.clone().requires_grad_() for each in (inputs.x, inputs.codes))
    q = codes[indices]
    straight = x + (q - x).detach()
    loss = (q - x.detach()).square().mean() + (q.detach() - x).square().mean()
    grads = torch.autograd.grad((straight * inputs.grad).sum() + loss, (x, codes))
    rows = q.detach()
    assert not judge.quantized(inputs, (rows, indices), grads, FLOAT32).wrong
    assert not judge.quantized(inputs, (rows, indices), grads[:1], FLOAT32).wrong
    assert judge.quantized(inputs, (rows, spoiled(indices)), grads, FLOAT32).wrong
    assert judge.quantized(inputs, (codes.detach()[spoiled(indices)], indices), grads, FLOAT32).wrong
    assert judge.quantized(inputs, (rows, indices), (grads[0], grads[1] * 1.001), FLOAT32).wrong
    assert judge.quantized(inputs, (rows, indices), (grads[0] * torch.nan, grads[1]), FLOAT32).wrong


def test_values_of_another_shape_are_wrong():
    assert judge.close((torch.zeros(3),), (torch.zeros(3, 1),), FLOAT32).wrong
    assert not judge.close((torch.zeros(3),), (torch.zeros(3),), FLOAT32).wrong

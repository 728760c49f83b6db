"""Judges detect wrong answers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import judge
from benchmarks.calls import differentiable
from benchmarks.entry import TOLERANCES
from benchmarks.inputs import Size, draw
from dlvae_kernels.testing import exact_distances

CPU = torch.device("cpu")
SIZE = Size("test", 2_000, 40, 6, 4)
FLOAT32 = TOLERANCES["float32"]


@pytest.fixture
def inputs():
    return draw(SIZE, CPU)


@pytest.fixture
def indices(inputs):
    return exact_distances(inputs.x, inputs.codes).argmin(1)


def with_errors(indices):
    """The indices with one in a thousand replaced by another code."""
    wrong = indices.clone()
    wrong[::1000] = (wrong[::1000] + 1) % SIZE.k
    return wrong


def test_nearest_accepts_exact_indices(inputs, indices):
    verdict = judge.nearest(inputs, (indices,), None, FLOAT32)
    assert (verdict.differing, verdict.wrong) == (0, False)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_nearest_rejects_one_wrong_index_in_a_thousand(inputs, indices, precision):
    verdict = judge.nearest(inputs, (with_errors(indices),), None, TOLERANCES[precision])
    assert verdict.differing == pytest.approx(0.001)
    assert verdict.wrong


@pytest.mark.parametrize("off", [-1, SIZE.k])
def test_nearest_rejects_an_index_out_of_range(inputs, indices, off):
    indices[7] = off
    assert judge.nearest(inputs, (indices,), None, FLOAT32).wrong


def test_nearest_accepts_and_counts_a_near_tie(inputs, indices):
    codes = inputs.codes.clone()
    codes[1] = codes[0] * (1 + 2**-23)
    near = draw(SIZE, CPU)
    near.codes.copy_(codes)
    exact = exact_distances(near.x, codes).argmin(1)
    swapped = torch.where(exact <= 1, 1 - exact, exact)
    verdict = judge.nearest(near, (swapped,), None, FLOAT32)
    assert verdict.differing == pytest.approx(float((exact <= 1).double().mean()))
    assert 0 < verdict.differing < 1
    assert not verdict.wrong


def test_topk_rejects_wrong_order_repeats_and_distances(inputs):
    distances, indices = exact_distances(inputs.x, inputs.codes).topk(SIZE.selected, largest=False)
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


def test_quantized_rejects_wrong_indices_vectors_and_gradients(inputs, indices):
    x, codes = (each.clone().requires_grad_() for each in (inputs.x, inputs.codes))
    q = codes[indices]
    straight = x + (q - x).detach()
    loss = (q - x.detach()).square().mean() + (q.detach() - x).square().mean()
    grads = torch.autograd.grad((straight * inputs.grad).sum() + loss, (x, codes))
    vectors = q.detach()
    assert not judge.quantized(inputs, (vectors, indices), grads, FLOAT32).wrong
    assert not judge.quantized(inputs, (vectors, indices), grads[:1], FLOAT32).wrong
    assert judge.quantized(inputs, (vectors, with_errors(indices)), grads, FLOAT32).wrong
    assert judge.quantized(inputs, (codes.detach()[with_errors(indices)], indices), grads, FLOAT32).wrong
    assert judge.quantized(inputs, (vectors, indices), (grads[0], grads[1] * 1.001), FLOAT32).wrong
    assert judge.quantized(inputs, (vectors, indices), (grads[0] * torch.nan, grads[1]), FLOAT32).wrong


def test_largest_products_accepts_any_order_and_rejects_wrong_products(inputs):
    x, codes = inputs.x.double(), inputs.codes.double()
    values, indices = (x @ codes.T).topk(SIZE.selected)

    def is_wrong(*answer):
        return judge.largest_products(x, codes, None, answer, FLOAT32).wrong

    assert not is_wrong(indices.flip(1), values.flip(1).float())
    assert is_wrong(indices, values.flip(1))
    assert is_wrong(indices, values * 1.001)
    smallest = indices.clone()
    smallest[0, 0] = (x @ codes.T)[0].argmin()
    assert is_wrong(smallest, (x @ codes.T).gather(1, smallest))
    assert is_wrong(indices[:, :1].expand_as(indices), values)


def test_equals_rejects_wrong_values_and_gradients(inputs):
    def prepare(inputs):
        codes = inputs.codes.clone().requires_grad_()
        return differentiable(lambda: codes[inputs.indices[:, 0]], [codes], inputs.grad)

    (values,), (gradient,) = prepare(inputs).judged()
    is_equal = judge.equals(prepare)
    assert not is_equal(inputs, (values,), (gradient,), FLOAT32).wrong
    assert not is_equal(inputs, (values,), (), FLOAT32).wrong
    assert is_equal(inputs, (values * 1.001,), (gradient,), FLOAT32).wrong
    assert is_equal(inputs, (values,), (gradient * 1.001,), FLOAT32).wrong


def test_close_rejects_values_of_another_shape():
    assert judge.close((torch.zeros(3),), (torch.zeros(3, 1),), FLOAT32).wrong
    assert not judge.close((torch.zeros(3),), (torch.zeros(3),), FLOAT32).wrong

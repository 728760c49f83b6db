"""The assertions of dlvae_kernels.testing fail on wrong results."""

from __future__ import annotations

import pytest
import torch

from dlvae_kernels import nearest_code, topk_codes
from dlvae_kernels.testing import assert_accurate, assert_same_codes, assert_same_topk

X, CODES = torch.tensor([[0.0], [2.0], [10.0]]), torch.tensor([[1.0], [1.0], [9.0]])


def test_assert_same_codes_wrong_codes_raise():
    assert assert_same_codes(nearest_code(X, CODES), X, CODES) == 0
    for wrong in ([0, 0, 0], [1, 0, 2], [0, 0, 3]):
        with pytest.raises(AssertionError):
            assert_same_codes(torch.tensor(wrong), X, CODES)
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_codes(torch.tensor([0, 0, 2], dtype=torch.int32), X, CODES)
    with pytest.raises(AssertionError, match="shape"):
        assert_same_codes(torch.tensor([[0, 0, 2]]), X, CODES)


def test_assert_same_codes_near_ties_are_counted():
    x, codes = torch.full((1000, 1), 100.0), torch.tensor([[100.01], [99.9901]])
    assert nearest_code(x, codes).unique().tolist() == [1]
    few = torch.ones(1000, dtype=torch.int64)
    few[:5] = 0
    assert assert_same_codes(few, x, codes) == 5
    with pytest.raises(AssertionError, match="near-ties"):
        assert_same_codes(torch.zeros(1000, dtype=torch.int64), x, codes)


def test_assert_same_topk_wrong_distances_raise():
    indices, distances = topk_codes(X, CODES, 2)
    assert_same_topk(indices, distances, X, CODES)
    with pytest.raises(AssertionError, match="tie"):
        assert_same_topk(indices[:2].flip(1), distances[:2], X[:2], CODES)
    with pytest.raises(AssertionError, match="distance is wrong"):
        assert_same_topk(indices, distances + 1, X, CODES)
    with pytest.raises(AssertionError, match="repeated"):
        assert_same_topk(torch.zeros_like(indices), distances, X, CODES)
    with pytest.raises(AssertionError, match="not among the best"):
        assert_same_topk(torch.tensor([[0, 2]] * 3), distances, X, CODES)


def test_assert_same_topk_wrong_products_raise():
    bias = torch.tensor([0.0, 0.0, -70.0])
    indices, products = topk_codes(X, CODES, 2, metric="dot", bias=bias)
    assert_same_topk(indices, products, X, CODES, metric="dot", bias=bias)
    with pytest.raises(AssertionError, match="tie"):
        assert_same_topk(indices[:2].flip(1), products[:2], X[:2], CODES, metric="dot", bias=bias)
    with pytest.raises(AssertionError, match="product is wrong"):
        assert_same_topk(indices, products + 1, X, CODES, metric="dot", bias=bias)
    with pytest.raises(AssertionError, match="not among the best"):
        assert_same_topk(indices, products, X, CODES, metric="dot")


def test_assert_accurate_wrong_values_raise():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert_accurate(exact.float(), exact, exact.float())
    for wrong in (exact + 1e-3, exact * torch.nan):
        with pytest.raises(AssertionError, match="relative error"):
            assert_accurate(wrong, exact, exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(exact[:1], exact, exact)

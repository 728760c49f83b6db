"""Properties of searches among small integers, where nearly every vector has a tie."""

from __future__ import annotations

import pytest
import torch

from dlvae_kernels import nearest_code, topk_codes
from dlvae_kernels.testing import exact_distances

# This is a separate file, so that the other tests run without hypothesis.
pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nearest_code_small_integers_match_float64(data):
    n, k, d = (data.draw(st.integers(1, high)) for high in (40, 40, 6))
    seed = data.draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (n, d), generator=generator).float()
    codebook = torch.randint(-2, 3, (k, d), generator=generator).float()
    assert torch.equal(nearest_code(x, codebook), exact_distances(x, codebook).argmin(1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_topk_codes_small_integers_match_float64(data):
    n, num_atoms, d = (data.draw(st.integers(1, high)) for high in (20, 40, 4))
    k = data.draw(st.integers(1, num_atoms))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    x = torch.randint(-2, 3, (n, d), generator=generator).float()
    dictionary = torch.randint(-2, 3, (num_atoms, d), generator=generator).float()
    exact = exact_distances(x, dictionary)
    expected = exact.argsort(dim=1, stable=True)[:, :k]
    indices, distances = topk_codes(x, dictionary, k)
    assert torch.equal(indices, expected)
    assert torch.equal(distances.double(), exact.gather(1, expected))
    bias = torch.randint(-2, 3, (num_atoms,), generator=generator).float()
    exact = x @ dictionary.T + bias
    expected = exact.argsort(dim=1, stable=True, descending=True)[:, :k]
    indices, products = topk_codes(x, dictionary, k, metric="dot", bias=bias)
    assert torch.equal(indices, expected)
    assert torch.equal(products, exact.gather(1, expected))

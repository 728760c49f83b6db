"""Assertions that compare a backend with a float64 reference; use them to check a backend of your own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .functional.topk_codes import Metric

# Two squared distances nearly tie when they differ by at most this times (|x| + |c|)^2, the rounding of a search that
# accumulates in float32.
NEAR_TIE = 2.0**-20
_CHUNK_ELEMENTS = 2**22


def exact_distances(x: Tensor, codes: Tensor) -> Tensor:
    """Squared distances of vectors x [N, D] and codes [K, D] by differences in float64: [N, K]."""
    return _by_pairs(lambda vector, code: (vector - code).square().sum(2), x, codes)


def exact_products(x: Tensor, codes: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inner products of vectors x [N, D] and codes [K, D] plus bias [K] in float64, equal for equal codes: [N, K]."""
    products = _by_pairs(lambda vector, code: (vector * code).sum(2), x, codes)
    return products if bias is None else products + bias.double()


def _by_pairs(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, codes: Tensor) -> Tensor:
    x, codes = x.double(), codes.double()
    size = max(1, _CHUNK_ELEMENTS // max(1, codes.numel()))
    chunks = [function(chunk[:, None], codes) for chunk in x.split(size)]
    return torch.cat(chunks) if chunks else x.new_empty(0, len(codes))


def assert_same_codes(indices: Tensor, x: Tensor, codebook: Tensor, *, max_near_ties: float = 0.01) -> int:
    """Assert that indices [...] are the float64 argmin of finite vectors x [..., D] over codebook [K, D].

    Another index passes only where its float64 distance nearly ties with the best (never at an exact tie, which
    gives the lowest index), and only for a fraction `max_near_ties` of the vectors.

    Returns:
        The number of vectors with another index that nearly ties.
    Raises:
        AssertionError: names a vector that differs, or the number of near ties.
    """
    assert indices.dtype == torch.int64, f"expected indices of dtype torch.int64, got {indices.dtype}"
    assert indices.shape == x.shape[:-1], f"expected indices of shape {tuple(x.shape[:-1])}, got {tuple(indices.shape)}"
    vectors, assigned = x.reshape(-1, x.shape[-1]), indices.flatten()
    if len(vectors) == 0:
        return 0
    assert ((assigned >= 0) & (assigned < len(codebook))).all(), f"expected indices in [0, {len(codebook)}), got others"
    distances = exact_distances(vectors, codebook)
    best, expected = distances.min(1)
    excess = distances.gather(1, assigned[:, None]).squeeze(1) - best
    differs = assigned != expected
    wrong = differs & ((excess > near_tie_bound(vectors, codebook, assigned)) | (excess == 0))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {len(vectors)} vectors have a wrong code: expected code {int(expected[i])} at the"
            f" squared distance {float(best[i]):.6g} for vector {i}, got code {int(assigned[i])}, which is"
            f" {float(excess[i]):.3g} farther"
        )
    near = int(differs.sum())
    allowed = max(1.0, max_near_ties * len(vectors))
    assert near <= allowed, f"expected at most {allowed:g} near-ties among {len(vectors)} vectors, got {near}"
    return near


def assert_same_topk(
    indices: Tensor,
    values: Tensor,
    x: Tensor,
    dictionary: Tensor,
    *,
    metric: Metric = "l2",
    bias: Tensor | None = None,
) -> None:
    """Assert that indices and values [..., k] are those of the k best of dictionary [K, D] for finite x.

    Args:
        values: squared distances, or with the metric "dot" inner products plus bias [K].
    Raises:
        AssertionError: names the difference: a repeated or worse code, the order, or a value.
    """
    k = indices.shape[-1]
    vectors, selected, actual = x.reshape(-1, x.shape[-1]), indices.reshape(-1, k), values.reshape(-1, k).double()
    if metric == "l2":
        exact = exact_distances(vectors, dictionary)
        bound = torch.stack([near_tie_bound(vectors, dictionary, selected[:, j]) for j in range(k)], dim=1)
        rank_bound, word = bound, "distance"
    else:
        exact, actual = -exact_products(vectors, dictionary, bias), -actual
        bounds = NEAR_TIE * vectors.double().norm(dim=1, keepdim=True) * dictionary.double().norm(dim=1)
        bounds = bounds if bias is None else bounds + NEAR_TIE * bias.double().abs()
        # The product that belongs at a rank may be that of any code, so the largest bound applies.
        bound, rank_bound, word = bounds.gather(1, selected), bounds.amax(1, keepdim=True), "product"
    ordered = exact.sort(dim=1).values[:, :k]
    found = exact.gather(1, selected)
    assert (selected.sort(dim=1).values.diff(dim=1) > 0).all(), "an index is repeated for a vector"
    assert ((found - ordered).abs() <= rank_bound).all(), "a code is not among the best, or out of order"
    assert ((actual - found).abs() <= bound).all(), f"a {word} is wrong"
    assert (actual.diff(dim=1) >= 0).all(), f"{word}s are out of order"
    ties = found.diff(dim=1) == 0
    assert (selected.diff(dim=1)[ties] > 0).all(), "a tie is not ordered by index"


def assert_accurate(actual: Tensor, exact: Tensor, expression: Tensor, *, floor: float = 1e-6) -> None:
    """Assert that the error of `actual` is at most twice that of a PyTorch `expression` in the same dtype.

    Errors are norms of the difference to the float64 `exact`, relative to its norm; the tolerance also holds `floor`.
    """
    assert actual.shape == exact.shape, f"expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
    scale = float(exact.double().norm()) or 1.0
    error = float((actual.double() - exact.double()).norm()) / scale
    allowed = 2 * float((expression.double() - exact.double()).norm()) / scale + floor
    assert error <= allowed, f"expected a relative error of at most {allowed:.3g}, got {error:.3g}"  # NaN fails too


def near_tie_bound(x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """The largest difference of near ties, for the squared distances of x [N, D] to the codes at indices [N]: [N]."""
    return NEAR_TIE * (x.double().norm(dim=1) + codes.double().norm(dim=1)[indices]).square()

"""Assertions by which the backends are tested against float64; use them to check a backend of your own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .functional.topk_codes import Metric

# Two squared distances nearly tie when they differ by at most this times (|x| + |c|)^2: the rounding of a search that
# accumulates in float32.
NEAR_TIE = 2.0**-20
_CHUNK_ELEMENTS = 2**22


def exact_distances(x: Tensor, codes: Tensor) -> Tensor:
    """Squared distances of rows x [N, D] to codes [K, D] by differences in float64: [N, K]."""
    return _by_pairs(lambda row, code: (row - code).square().sum(2), x, codes)


def exact_products(x: Tensor, codes: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inner products of rows x [N, D] with codes [K, D] plus bias [K] in float64, equal for equal codes: [N, K]."""
    products = _by_pairs(lambda row, code: (row * code).sum(2), x, codes)
    return products if bias is None else products + bias.double()


def _by_pairs(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, codes: Tensor) -> Tensor:
    x, codes = x.double(), codes.double()
    chunk = max(1, _CHUNK_ELEMENTS // max(1, codes.numel()))
    parts = [function(part[:, None], codes) for part in x.split(chunk)]
    return torch.cat(parts) if parts else x.new_empty(0, len(codes))


def assert_same_codes(indices: Tensor, x: Tensor, codebook: Tensor, *, max_near_ties: float = 0.01) -> int:
    """Assert that indices [...] are the float64 argmin of finite rows x [..., D] over codebook [K, D].

    Another index passes only where its float64 distance nearly ties with the best (never at an exact tie, which
    takes the lowest index), and only in a share `max_near_ties` of the rows.

    Returns:
        How many rows nearly tie.
    Raises:
        AssertionError: says which row differs, or how many nearly tie.
    """
    assert indices.dtype == torch.int64, f"indices have dtype {indices.dtype}, not int64"
    assert indices.shape == x.shape[:-1], f"indices have shape {tuple(indices.shape)}, not {tuple(x.shape[:-1])}"
    rows, chosen = x.reshape(-1, x.shape[-1]), indices.flatten()
    if len(rows) == 0:
        return 0
    assert ((chosen >= 0) & (chosen < len(codebook))).all(), f"indices leave [0, {len(codebook)})"
    distances = exact_distances(rows, codebook)
    best, expected = distances.min(1)
    excess = distances.gather(1, chosen[:, None]).squeeze(1) - best
    differs = chosen != expected
    wrong = differs & ((excess > near_tie_bound(rows, codebook, chosen)) | (excess == 0))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {len(rows)} rows have a wrong code; row {row} has {int(chosen[row])}, which is"
            f" {float(excess[row]):.3g} farther than {int(expected[row])} at {float(best[row]):.6g}"
        )
    near = int(differs.sum())
    assert near <= max(1.0, max_near_ties * len(rows)), f"{near} of {len(rows)} rows differ, if only by near-ties"
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
        AssertionError: says what differs: a repeated or worse code, the order, or a value.
    """
    k = indices.shape[-1]
    rows, chosen, given = x.reshape(-1, x.shape[-1]), indices.reshape(-1, k), values.reshape(-1, k).double()
    if metric == "l2":
        exact = exact_distances(rows, dictionary)
        bound = torch.stack([near_tie_bound(rows, dictionary, chosen[:, j]) for j in range(k)], dim=1)
        best, word = bound, "distance"
    else:
        exact, given = -exact_products(rows, dictionary, bias), -given
        bounds = NEAR_TIE * rows.double().norm(dim=1, keepdim=True) * dictionary.double().norm(dim=1)
        bounds = bounds if bias is None else bounds + NEAR_TIE * bias.double().abs()
        # The product with the code that belongs at a rank may round as any does.
        bound, best, word = bounds.gather(1, chosen), bounds.amax(1, keepdim=True), "product"
    ordered = exact.sort(dim=1).values[:, :k]
    found = exact.gather(1, chosen)
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all(), "an index is repeated in a row"
    assert ((found - ordered).abs() <= best).all(), "a code is not among the best, or out of order"
    assert ((given - found).abs() <= bound).all(), f"a {word} is wrong"
    assert (given.diff(dim=1) >= 0).all(), f"{word}s are out of order"
    ties = found.diff(dim=1) == 0
    assert (chosen.diff(dim=1)[ties] > 0).all(), "a tie does not go by index"


def assert_accurate(actual: Tensor, exact: Tensor, expression: Tensor, *, floor: float = 1e-6) -> None:
    """Assert that `actual` errs from the float64 `exact` at most twice as much as a same-dtype PyTorch `expression`.

    Errors are norms over the whole tensor, relative to that of `exact`; `floor` is added to the allowance.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    scale = float(exact.double().norm()) or 1.0
    error = float((actual.double() - exact.double()).norm()) / scale
    allowed = 2 * float((expression.double() - exact.double()).norm()) / scale + floor
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"  # a NaN fails too


def near_tie_bound(x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """How much two squared distances of a row of x [N, D] may differ and still nearly tie, at its code indices [N]."""
    return NEAR_TIE * (x.double().norm(dim=1) + codes.double().norm(dim=1)[indices]).square()

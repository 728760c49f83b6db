"""Assertions by which the backends are tested against float64; use them to check a backend of your own."""

from __future__ import annotations

import torch
from torch import Tensor

# Two squared distances nearly tie when they differ by at most this times (|x| + |c|)^2: the rounding of a search that
# accumulates in float32.
NEAR_TIE = 2.0**-20
_CHUNK_ELEMENTS = 2**22


def exact_distances(x: Tensor, codes: Tensor) -> Tensor:
    """Squared distances of rows x [N, D] to codes [K, D] by differences in float64: [N, K]."""
    x, codes = x.double(), codes.double()
    chunk = max(1, _CHUNK_ELEMENTS // max(1, codes.numel()))
    parts = [(part[:, None] - codes).square().sum(2) for part in x.split(chunk)]
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


def assert_same_topk(indices: Tensor, distances: Tensor, x: Tensor, dictionary: Tensor) -> None:
    """Assert that indices and squared distances [..., k] are those of the k nearest of dictionary [K, D] to finite x.

    Raises:
        AssertionError: says what differs: a repeated or farther code, the order, or a distance.
    """
    k = indices.shape[-1]
    rows, chosen, given = x.reshape(-1, x.shape[-1]), indices.reshape(-1, k), distances.reshape(-1, k).double()
    exact = exact_distances(rows, dictionary)
    ordered = exact.sort(dim=1).values[:, :k]
    found = exact.gather(1, chosen)
    bound = torch.stack([near_tie_bound(rows, dictionary, chosen[:, j]) for j in range(k)], dim=1)
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all(), "an index is repeated in a row"
    assert ((found - ordered).abs() <= bound).all(), "a code is not among the nearest, or out of order"
    assert ((given - found).abs() <= bound).all(), "a distance is wrong"
    assert (given.diff(dim=1) >= 0).all(), "distances do not ascend"
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

"""The specification of the searches: the scores of all codes for a chunk of vectors, in float64.

Distances are sums of squared differences, and products those of a matrix product whose equal codes share one column, so
that equal codes tie exactly. Vectors and codes are scaled by powers of two, which is exact: squares and products
neither overflow nor underflow, and values are scaled back at the end.

Rules for values that are not finite: a code or bias that holds NaN comes after all others; all other scores that are
infinite or undefined tie, after the finite ones; all codes tie for a vector that holds NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of one [n, K] chunk of scores: 16 MiB in float64, so that memory stays bounded at any N.
_CHUNK_ELEMENTS = 2**21
_LARGEST = torch.finfo(torch.float64).max


class Scores(NamedTuple):
    """Scores of K codes for n vectors: the best code has the lowest key and, among equal keys, the lowest index."""

    part: Tensor  # int64 [n], positions of the vectors in the batch
    keys: Tensor  # float64 [n, K]
    scaled: Tensor  # float64 [n, K], scaled squared distances or products
    units: tuple[Tensor, Tensor]  # float64 [n, 1] or scalars, powers of two by which `scaled` is scaled back

    def values(self, indices: Tensor) -> Tensor:
        """The squared distances or products of the codes at `indices` [n, k]."""
        return self.scaled.gather(1, indices) * self.units[0] * self.units[1]


def distance_scores(x: Tensor, codes: Tensor) -> Iterator[Scores]:
    """Squared distances of x [N, D] and codes [K, D]; the lowest is the best."""
    x, codes = x.double(), codes.double()
    is_nan_code = codes.isnan().any(1)
    # Vectors of one exponent share a call of cdist: multiples of 256, so that nearly all data have the exponent 0.
    exponents = torch.minimum(_exponents_to_one(x, 1), _exponents_to_one(codes.flatten(), 0))
    exponents = torch.div(exponents + 128, 256, rounding_mode="floor").clamp_(-3, 3) * 256  # [N]
    for exponent in exponents.unique():
        scale, unit = _power_of_two(exponent), _power_of_two(-exponent)
        scaled_codes = codes * scale
        for part in (exponents == exponent).nonzero().squeeze(1).split(_chunk_size(codes)):
            mode = "donot_use_mm_for_euclid_dist"
            squares = torch.cdist(x[part] * scale, scaled_codes, compute_mode=mode).square_()
            yield Scores(part, _keys(squares, x[part], is_nan_code), squares, (unit, unit))


def product_scores(x: Tensor, codes: Tensor, bias: Tensor | None) -> Iterator[Scores]:
    """Inner products of x [N, D] and codes [K, D] plus bias [K]; the largest is the best."""
    x, codes = x.double(), codes.double()
    bias = codes.new_zeros(len(codes)) if bias is None else bias.double()
    is_nan_code = codes.isnan().any(1) | bias.isnan()
    first = _first_equal(torch.cat([codes, bias[:, None]], 1))
    code_exponent = _exponents_to_one(codes.flatten(), 0)
    scaled_codes = codes * _power_of_two(code_exponent)
    # The scale takes each vector to about 1, unless biases, which are scaled as products are, would exceed that.
    most = (_exponents_to_one(bias, 0) - code_exponent).clamp(-1000, 1000)
    exponents = _exponents_to_one(x, 1)[:, None]  # [N, 1]
    exponents = torch.minimum(exponents, most) if bias.any() else exponents
    for part in torch.arange(len(x), device=x.device).split(_chunk_size(codes)):
        units = _power_of_two(-exponents[part]), _power_of_two(-code_exponent)
        scaled_bias = bias / units[0] / units[1]  # [n, K]
        products = torch.addmm(scaled_bias, x[part] / units[0], scaled_codes.T)[:, first]
        yield Scores(part, _keys(-products, x[part], is_nan_code), products, units)


def _keys(scores: Tensor, x: Tensor, is_nan_code: Tensor) -> Tensor:
    """Keys [n, K] that follow the rules for values that are not finite, from scores whose lowest is the best."""
    keys = scores.nan_to_num(nan=_LARGEST, posinf=_LARGEST, neginf=_LARGEST)
    return keys.masked_fill_(is_nan_code, torch.inf).masked_fill_(x.isnan().any(1, keepdim=True), 0)


def _first_equal(rows: Tensor) -> Tensor:
    """The lowest index of an equal row, for each of the rows [K, D]; rows that hold NaN equal each other."""
    rows = torch.where(rows.isnan().any(1, keepdim=True), 0, rows) + 0.0  # + 0.0 turns -0.0 into 0.0
    _, groups = rows.unique(dim=0, return_inverse=True)  # [K]
    order = torch.arange(len(rows), device=rows.device)
    return torch.full_like(order, len(rows)).scatter_reduce_(0, groups, order, "amin")[groups]


def _chunk_size(codes: Tensor) -> int:
    """The number of vectors whose scores make a chunk."""
    return max(1, _CHUNK_ELEMENTS // len(codes))


def _exponents_to_one(values: Tensor, dim: int) -> Tensor:
    """Exponents of the powers of two that take the largest finite magnitudes of float64 values along dim to about 1.

    Where all are zero, any power does: the result is the largest exponent, which changes no minimum with others.
    """
    largest = values.abs().nan_to_num(nan=0, posinf=0).amax(dim)
    exponents = -torch.frexp(largest).exponent.long().clamp(-1000, 1000)
    return exponents.masked_fill_(largest == 0, 1000)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly, which exp2 does not promise; int64 within [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)

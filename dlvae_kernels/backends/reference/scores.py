"""What the reference searches share: the scores of all codes for a chunk of rows, and an exact look where two tie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of one [rows, K] chunk of scores: 16 MiB in float64, so that memory stays bounded at any N.
_CHUNK_ELEMENTS = 2**21
_EPSILON = torch.finfo(torch.float64).eps
_LARGEST = torch.finfo(torch.float64).max
# Exponents of the powers of two by which inputs are scaled stay within this.
_MOST_EXPONENT = 1000
# A row this many powers of two longer than all codes is as far from one as from another, in float64.
_FAR = 400


class Codes(NamedTuple):
    """What all chunks share, in float64; 2^exponent takes the largest magnitude to about 1."""

    unscaled: Tensor  # [K, D]
    rows: Tensor  # [K, D], times 2^exponent
    norms: Tensor  # [K], of these
    bias: Tensor  # [K]
    exponent: Tensor  # int64, a scalar


class Scores:
    """The scores of K codes for n rows [n, D]; the lowest is the best.

    They are a matrix product in float64: immune to the caller's tf32 and autocast settings, and exact far beyond
    float32. But a product may round equal codes differently, and cancels for close ones. Where that could matter, the
    score is computed again, each pair of a row and a code by itself. Rows and codes are scaled by powers of two, so
    that squares and products neither overflow nor underflow.

    A score that is not a number is the largest finite one, that of a NaN code is infinite: such a code is never
    preferred to another. All scores of a row that holds an infinity are equal, but for those of NaN codes; all scores
    of a row that holds NaN are equal.
    """

    def __init__(self, rows: Tensor, codes: Codes) -> None:
        self._codes = codes
        self._unscaled = rows  # [n, D]
        self._exponents = self._row_exponents(rows)  # int64 [n, 1]
        self._rows = rows * _power_of_two(self._exponents)  # [n, D]
        self._row_norms = self._rows.norm(dim=1, keepdim=True)  # [n, 1]
        self._is_nan_code = codes.norms.isnan() | codes.bias.isnan()
        self.values = self._products()  # [n, K]
        self.values.masked_fill_(~self._row_norms.isfinite(), 0)
        self.values.masked_fill_(self._is_nan_code & ~self._row_norms.isnan(), torch.inf)

    def _row_exponents(self, rows: Tensor) -> Tensor:
        """The exponents of the powers of two that rows are multiplied by: [n, 1]."""
        raise NotImplementedError

    def tolerance(self, codes: Tensor) -> Tensor:
        """How far above the score of `codes` [n, m] another may lie and yet be no worse: [n, m]."""
        raise NotImplementedError

    def results(self, codes: Tensor, has_tie: Tensor) -> Tensor:
        """What the caller wants to know of `codes` [n, m]; as `exact` has it in rows where has_tie [n]."""
        raise NotImplementedError

    def _products(self) -> Tensor:
        """All scores, by a matrix product; none is NaN but that of a NaN row or code."""
        raise NotImplementedError

    def _of_pairs(self, row: Tensor, code: Tensor) -> Tensor:
        """Exact scores of pairs of a row and a code, both [P], where those of equal codes are equal: [P]."""
        raise NotImplementedError

    def exact(self, is_row: Tensor, threshold: Tensor) -> Tensor:
        """Exact scores, for the rows where is_row [n], of codes with a score of at most the threshold [n, 1]; infinite
        for all others: [rows, K]."""
        row, code = ((self.values <= threshold) & is_row[:, None]).nonzero(as_tuple=True)
        found = self._of_pairs(row, code).nan_to_num(nan=_LARGEST, posinf=_LARGEST, neginf=_LARGEST)
        norm = self._row_norms[row, 0]
        found.masked_fill_(~norm.isfinite(), 0)
        found.masked_fill_(self._is_nan_code[code] & ~norm.isnan(), torch.inf)
        place = is_row.cumsum(0) - 1  # of each row among those asked for
        scores = self.values.new_full((int(is_row.sum()), len(self._codes.rows)), torch.inf)
        scores[place[row], code] = found
        return scores

    def _split(self, row: Tensor, code: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of a row and a code, both [P], in parts whose features fit in memory."""
        pairs = max(1, _CHUNK_ELEMENTS // self._rows.shape[1])
        return zip(row.split(pairs), code.split(pairs), strict=True)


class Distances(Scores):
    """|c|^2 - 2 x.c, a squared distance less |x|^2, which all codes share; exactly: |x - c|."""

    def _row_exponents(self, rows: Tensor) -> Tensor:
        # Those of the codes; a row far longer than these is brought near enough for its square.
        return torch.minimum(self._codes.exponent, _exponents_to_one(rows, dim=1) + _FAR)

    def tolerance(self, codes: Tensor) -> Tensor:
        # Both scores are sums of D + 1 terms; a code as far away as c has a norm of at most 2 |x| + |c|.
        largest = 2 * self._row_norms + self._codes.norms[codes]
        return (4 * (self._rows.shape[1] + 2) * _EPSILON * largest.square()).nan_to_num(nan=0, posinf=0)

    def results(self, codes: Tensor, has_tie: Tensor) -> Tensor:
        """Squared distances, by differences."""
        row = torch.arange(len(codes), device=codes.device).repeat_interleave(codes.shape[1])
        squares, exponents = self._differences(row, codes.flatten())
        unit = _power_of_two(-exponents)
        return (squares * unit * unit).view(codes.shape)

    def _products(self) -> Tensor:
        scores = torch.addmm(self._codes.norms.square(), self._rows, self._codes.rows.T, alpha=-2)
        return torch.nan_to_num(scores, nan=_LARGEST, posinf=_LARGEST, neginf=-_LARGEST, out=scores)

    def _of_pairs(self, row: Tensor, code: Tensor) -> Tensor:
        # Roots of squared distances have their order, and neither overflow nor underflow.
        squares, exponents = self._differences(row, code)
        return squares.sqrt() * _power_of_two(-exponents)

    def _differences(self, row: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances of pairs times 4^exponent, where the largest difference comes to about 1; and exponents."""
        squares, exponents = [], []
        for i, j in self._split(row, code):
            difference = self._unscaled[i] - self._codes.unscaled[j]
            exponent = _exponents_to_one(difference, dim=1)
            squares.append((difference * _power_of_two(exponent)).square().sum(1))
            exponents.append(exponent.squeeze(1))
        return torch.cat(squares), torch.cat(exponents)


class Products(Scores):
    """-(x.c + b): the largest inner product is the best. One that is infinite comes after all finite ones."""

    def __init__(self, rows: Tensor, codes: Codes) -> None:
        super().__init__(rows, codes)
        norm = codes.norms.nan_to_num(nan=0, posinf=0).amax()
        bias = self._bias.abs().nan_to_num(nan=0, posinf=0).amax(1, keepdim=True)
        # Two sums of D + 1 terms, of codes of any norm.
        self._tolerance = 2 * (rows.shape[1] + 2) * _EPSILON * (self._row_norms * norm + bias)  # [n, 1]

    def _row_exponents(self, rows: Tensor) -> Tensor:
        # Each row to 1, unless biases, which are scaled as products are, would become larger than that.
        most = _exponents_to_one(self._codes.bias, dim=0) - self._codes.exponent
        most = torch.where(self._codes.bias.any(), most.clamp(-_MOST_EXPONENT, _MOST_EXPONENT), _MOST_EXPONENT)
        exponents = torch.minimum(_exponents_to_one(rows, dim=1), most)
        self._unit = _power_of_two(-exponents), _power_of_two(-self._codes.exponent)
        self._bias = self._codes.bias / self._unit[0] / self._unit[1]  # [n, K]
        return exponents

    def tolerance(self, codes: Tensor) -> Tensor:
        return self._tolerance.nan_to_num(nan=0, posinf=0).expand(codes.shape)

    def results(self, codes: Tensor, has_tie: Tensor) -> Tensor:
        """Inner products; those that are not finite as they are."""
        products = -self.values.gather(1, codes)
        hidden = (products.abs() >= _LARGEST) | ~self._row_norms.isfinite()
        row, column = (hidden | has_tie[:, None]).nonzero(as_tuple=True)
        products[row, column] = -self._of_pairs(row, codes[row, column])
        return products * self._unit[0] * self._unit[1]

    def _products(self) -> Tensor:
        scores = torch.addmm(self._bias, self._rows, self._codes.rows.T).neg_()
        return torch.nan_to_num(scores, nan=_LARGEST, posinf=_LARGEST, neginf=_LARGEST, out=scores)

    def _of_pairs(self, row: Tensor, code: Tensor) -> Tensor:
        parts = [(self._rows[i] * self._codes.rows[j]).sum(1) + self._bias[i, j] for i, j in self._split(row, code)]
        return -torch.cat(parts)


def score_chunks(
    x: Tensor, codes: Tensor, metric: type[Scores] = Distances, bias: Tensor | None = None
) -> Iterator[tuple[slice, Scores]]:
    """The scores of codes [K, D] for x [N, D], in chunks of rows; bias [K] is added to products."""
    exponent = _exponents_to_one(codes.double().flatten(), dim=0)
    wide = codes.double() * _power_of_two(exponent)
    wide_bias = wide.new_zeros(len(wide)) if bias is None else bias.double()
    shared = Codes(codes.double(), wide, wide.norm(dim=1), wide_bias, exponent)
    rows = max(1, _CHUNK_ELEMENTS // len(codes))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        yield part, metric(x[part].double(), shared)


def _exponents_to_one(values: Tensor, dim: int) -> Tensor:
    """Exponents of powers of two that take the largest finite magnitudes of float64 values along dim to about 1.

    Where all are zero, any power does; it is the largest, so that others decide.
    """
    largest = values.abs().nan_to_num(nan=0, posinf=0).amax(dim, keepdim=values.ndim > 1)
    exponents = -torch.frexp(largest).exponent.long().clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    return exponents.masked_fill_(largest == 0, _MOST_EXPONENT)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, to the bit, which exp2 does not promise; int64 within [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)

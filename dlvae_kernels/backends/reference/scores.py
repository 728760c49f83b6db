"""What the reference searches share: the scores of all codes for a chunk of rows, and an exact look where two tie."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one [rows, K] chunk of scores: 16 MiB in float64, so that memory stays bounded at any N.
_CHUNK_ELEMENTS = 2**21
_EPSILON = torch.finfo(torch.float64).eps
_LARGEST = torch.finfo(torch.float64).max


class Scores:
    """The scores of K codes for n rows: |c|^2 - 2 x.c, a squared distance less |x|^2, which all codes share.

    They are a matrix product in float64: immune to the caller's tf32 and autocast settings, and exact far beyond
    float32. But a product may round equal codes differently, and cancels for close ones. Where that could matter, the
    squared distance is computed again by differences.

    A score that is not a number is the largest finite one, that of a NaN code is infinite: such a code is never
    preferred to another. All scores of a row that holds NaN are equal.
    """

    def __init__(self, rows: Tensor, codes: Tensor, code_norms: Tensor) -> None:
        self._rows = rows  # [n, D]
        self._codes = codes  # [K, D]
        self._code_norms = code_norms  # [K]
        self._row_norms = rows.norm(dim=1, keepdim=True)  # [n, 1]
        self._is_nan_code = code_norms.isnan()
        self.values = torch.addmm(code_norms.square(), rows, codes.T, alpha=-2)  # [n, K]
        torch.nan_to_num(self.values, nan=_LARGEST, posinf=_LARGEST, neginf=-_LARGEST, out=self.values)
        self.values.masked_fill_(self._is_nan_code, torch.inf)
        self.values.masked_fill_(self._row_norms.isnan(), 0)

    def tolerance(self, codes: Tensor) -> Tensor:
        """How far above the score of `codes` [n, m] another may lie and yet be no farther away: [n, m].

        Both scores are sums of D + 1 terms; a code as far away as c has a norm of at most 2 |x| + |c|.
        """
        largest = 2 * self._row_norms + self._code_norms[codes]
        return (4 * (self._codes.shape[1] + 2) * _EPSILON * largest.square()).nan_to_num(nan=0, posinf=0)

    def exact(self, is_row: Tensor, threshold: Tensor) -> Tensor:
        """Squared distances by differences, for the rows where is_row [n], of codes with a score of at most the
        threshold [n, 1]; infinite for all others: [rows, K]."""
        row, code = ((self.values <= threshold) & is_row[:, None]).nonzero(as_tuple=True)
        found = self._differences(row, code).nan_to_num(nan=_LARGEST, posinf=_LARGEST)
        found.masked_fill_(self._is_nan_code[code], torch.inf)
        found.masked_fill_(self._row_norms[row, 0].isnan(), 0)
        place = is_row.cumsum(0) - 1  # of each row among those asked for
        distances = self.values.new_full((int(is_row.sum()), len(self._codes)), torch.inf)
        distances[place[row], code] = found
        return distances

    def distances(self, codes: Tensor) -> Tensor:
        """Squared distances to `codes` [n, m], float64; by differences where the scores cancel."""
        distances = self.values.gather(1, codes) + self._row_norms.square()
        cancels = ~(distances > 2**20 * self.tolerance(codes))
        row, column = cancels.nonzero(as_tuple=True)
        distances[row, column] = self._differences(row, codes[row, column])
        return distances

    def _differences(self, row: Tensor, code: Tensor) -> Tensor:
        """|x - c|^2 for pairs of a row and a code, both [P]: [P]."""
        pairs = max(1, _CHUNK_ELEMENTS // self._rows.shape[1])
        parts = [
            (self._rows[i] - self._codes[j]).square().sum(1)
            for i, j in zip(row.split(pairs), code.split(pairs), strict=True)
        ]
        return torch.cat(parts)


def score_chunks(x: Tensor, codes: Tensor) -> Iterator[tuple[slice, Scores]]:
    """The scores of codes [K, D] for x [N, D], in chunks of rows."""
    wide = codes.double()
    norms = wide.norm(dim=1)
    rows = max(1, _CHUNK_ELEMENTS // len(codes))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        yield part, Scores(x[part].double(), wide, norms)

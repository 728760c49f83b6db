"""What the reference searches share: the scores of all codes for a chunk of rows, and when two of them tie."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one [rows, K] chunk of scores: 16 MiB in float64, so that memory stays bounded at any N.
_CHUNK_ELEMENTS = 2**21
_EPSILON = torch.finfo(torch.float64).eps
_LARGEST = torch.finfo(torch.float64).max


class Codes:
    """A codebook made ready for searching.

    Scores are |c|^2 - 2 x.c in float64: a squared distance less |x|^2, which is the same for all codes. In float64
    they are immune to the caller's tf32 and autocast settings, and exact far beyond float32.
    """

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes.double()  # [K, D]
        self.norms = self.codes.norm(dim=1)  # [K]
        self.is_nan = self.codes.isnan().any(1)  # [K]

    def chunks(self, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, scores [n, K], norms of the rows [n, 1]) for chunks of x [N, D].

        A score that is not a number is the largest finite one, that of a NaN code is infinite: such a code is never
        preferred to another. All scores of a row that holds NaN are equal, so that it gets the lowest index.
        """
        squared_norms = self.norms.square()
        rows = max(1, _CHUNK_ELEMENTS // len(self.codes))
        for start in range(0, len(x), rows):
            part = x[start : start + rows].double()  # [n, D]
            scores = torch.addmm(squared_norms, part, self.codes.T, alpha=-2)
            torch.nan_to_num(scores, nan=_LARGEST, posinf=_LARGEST, neginf=-_LARGEST, out=scores)
            scores.masked_fill_(self.is_nan, torch.inf)
            scores.masked_fill_(part.isnan().any(1, keepdim=True), 0)
            yield slice(start, start + rows), scores, part.norm(dim=1, keepdim=True)

    def tie_tolerance(self, row_norms: Tensor, codes: Tensor) -> Tensor:
        """How far above the score of `codes` [n, m] another may lie and still tie with it, for these rows [n, 1].

        A matrix product may round equal codes differently, so float64's own rounding counts as a tie. Both scores are
        sums of D + 1 terms; codes as far away as c have a norm of at most 2 |x| + |c|.
        """
        largest = 2 * row_norms + self.norms[codes]
        tolerance = 4 * (self.codes.shape[1] + 2) * _EPSILON * largest.square()
        return tolerance.nan_to_num(nan=0, posinf=0)

    def distances(self, scores: Tensor, codes: Tensor, row_norms: Tensor) -> Tensor:
        """Squared distances, float64, from the scores of `codes` [n, m] for these rows [n, 1]; zero is exactly zero."""
        distances = scores + row_norms.square()
        return distances.masked_fill(distances <= self.tie_tolerance(row_norms, codes), 0)

"""Sums of rows grouped by code, without atomics: the same bits at every run, on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def segment_sum(rows: Tensor, row_of: Tensor | None, codes: Tensor, num_codes: int, weights: Tensor | None) -> Tensor:
    """sums[c] = sum of weights[p] * rows[row_of[p]] over the pairs p with codes[p] == c, as [K, D].

    Args:
        rows: [N, D] float32 or float64.
        row_of: [P] row of each pair, or None where pair p is row p.
        codes: [P] code of each pair.
        weights: [P] as rows, or None for 1.
    """
    order = codes.argsort(stable=True)  # [P]: pairs by code, and within a code by their place
    ends = torch.bincount(codes, minlength=num_codes).cumsum(0)  # [K]
    offsets = torch.nn.functional.pad(ends, (1, 0))
    source = order if row_of is None else row_of[order]
    if len(codes) == 0:
        return rows.new_zeros(num_codes, rows.shape[1])
    per_pair = None if weights is None else weights[order]
    return embedding_bag(source, rows, offsets, mode="sum", per_sample_weights=per_pair, include_last_offset=True)

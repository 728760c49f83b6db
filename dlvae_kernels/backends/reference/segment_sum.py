"""Sums of vectors grouped by code, without atomics: bitwise reproducible on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

# The largest number of terms that are added one after another, since the error of a chain grows with its length.
CHAIN = 128


def segment_sum(rows: Tensor, row_of: Tensor | None, codes: Tensor, num_codes: int, weights: Tensor | None) -> Tensor:
    """sums[c] = sum of weights[p] * rows[row_of[p]] over the pairs p with codes[p] == c, as [K, D].

    Each CHAIN consecutive pairs of a code are added in the dtype of rows, and their sums in float64.

    Args:
        rows: [N, D] float32 or float64.
        row_of: [P] row of each pair, or None where pair p is row p.
        codes: [P] code of each pair.
        weights: [P] as rows, or None for 1.
    """
    if len(codes) == 0:
        return rows.new_zeros(num_codes, rows.shape[1])
    order = codes.argsort(stable=True)  # [P]: pairs by code, and within a code by position
    source = order if row_of is None else row_of[order]
    per_pair = None if weights is None else weights[order]
    counts = torch.bincount(codes, minlength=num_codes)
    starts = pad(counts.cumsum(0), (1, 0))  # [K + 1]
    if len(codes) <= CHAIN:
        return _sum_bags(source, rows, starts, per_pair)
    first_chains = pad(((counts + CHAIN - 1) // CHAIN).cumsum(0), (1, 0))  # [K + 1]
    # S = P // CHAIN + K is at least the number of chains, which the host does not know; the chains beyond are empty.
    chains = torch.arange(len(codes) // CHAIN + num_codes, device=codes.device)  # [S]
    of_code = torch.searchsorted(first_chains[1:], chains, right=True)  # K for the chains beyond
    chain_starts = starts[of_code] + (chains - first_chains[of_code]) * CHAIN
    chain_starts = pad(chain_starts.clamp(max=len(codes)), (0, 1), value=len(codes))
    chain_sums = _sum_bags(source, rows, chain_starts, per_pair)  # [S, D]
    # The last bag has the chains beyond.
    first_chains = pad(first_chains, (0, 1), value=len(chains))
    return _sum_bags(chains, chain_sums.double(), first_chains, None)[:num_codes].to(rows.dtype)


def _sum_bags(source: Tensor, rows: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """Sums of rows[source] over [starts[i], starts[i + 1]), in order."""
    return embedding_bag(source, rows, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)

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
    several = min(len(codes) // CHAIN, num_codes)
    if several == 0:
        return _sum_bags(source, rows, starts, per_pair)
    # The host does not know how many chains there are, so that some beyond the last are added, which are empty.
    code, chain, first_chains = _places_of(counts // CHAIN + 1, len(codes) // CHAIN + num_codes)
    chain_starts = pad((starts[code] + chain * CHAIN).clamp(max=len(codes)), (0, 1), value=len(codes))
    chain_sums = _sum_bags(source, rows, chain_starts, per_pair)
    sums = chain_sums[first_chains[:-1]]  # [K, D]
    # All codes with several chains are among these: their sums are not complete.
    longest = counts.topk(several).indices
    item, chain, first_parts = _places_of(counts[longest] // CHAIN + 1, len(codes) // CHAIN + several)
    parts = chain_sums[first_chains[pad(longest, (0, 1))[item]] + chain].double()
    # The last bag has the parts beyond.
    bags = pad(first_parts, (0, 1), value=len(parts))
    sums[longest] = _sum_bags(torch.arange(len(parts), device=rows.device), parts, bags, None)[:-1].to(rows.dtype)
    return sums


def _places_of(sizes: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Items [M] take `sizes` of `total` places in turn; returns the item of each place and its number within the item.

    Places beyond those of the last item have item M. The third result is where items begin, and the last ends: [M + 1].
    """
    first = pad(sizes.cumsum(0), (1, 0))
    place = torch.arange(total, device=sizes.device)
    item = torch.searchsorted(first[1:], place, right=True)
    return item, place - first[item], first


def _sum_bags(source: Tensor, rows: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """Sums of rows[source] over [starts[i], starts[i + 1]), in order."""
    return embedding_bag(source, rows, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)

"""Sums of vectors grouped by code, without atomics: bitwise reproducible on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

# The largest number of terms in a chain of additions; the error of a chain grows with its length.
CHAIN = 128


def segment_sum(
    vectors: Tensor, vector_of: Tensor | None, codes: Tensor, num_codes: int, weights: Tensor | None
) -> Tensor:
    """sums[c] = sum of weights[p] * vectors[vector_of[p]] over the pairs p with codes[p] == c, as [K, D].

    The pairs of a code are cut into chains of CHAIN consecutive pairs. A chain is summed in the dtype of vectors, and
    the sums of the chains in float64.

    Args:
        vectors: [N, D] float32 or float64.
        vector_of: [P] index of the vector of each pair, or None if pair p has vector p.
        codes: [P] code of each pair; -1 stands for no code, and leaves the pair out.
        weights: [P], dtype of vectors, or None for 1.
    """
    # Pairs by code, and within a code by position.
    order = codes.argsort(stable=True)[int((codes < 0).sum()) :]
    num_pairs = len(order)
    if num_pairs == 0:
        return vectors.new_zeros(num_codes, vectors.shape[1])
    source = order if vector_of is None else vector_of[order]
    per_pair = None if weights is None else weights[order]
    counts = torch.bincount(codes[order], minlength=num_codes)
    starts = pad(counts.cumsum(0), (1, 0))  # [K + 1]
    # An upper bound on the number of codes with more than one chain.
    num_long = min(num_pairs // CHAIN, num_codes)
    if num_long == 0:
        return _sum_bags(source, vectors, starts, per_pair)
    # The host allocates an upper bound on the number of chains; surplus chains are empty.
    code, chain, first_chains = _slots_of(counts // CHAIN + 1, num_pairs // CHAIN + num_codes)
    chain_starts = pad((starts[code] + chain * CHAIN).clamp(max=num_pairs), (0, 1), value=num_pairs)
    chain_sums = _sum_bags(source, vectors, chain_starts, per_pair)
    sums = chain_sums[first_chains[:-1]]  # [K, D]
    # So far sums holds the first chain of each code. All codes with more than one chain are among the longest.
    longest = counts.topk(num_long).indices
    item, chain, first_terms = _slots_of(counts[longest] // CHAIN + 1, num_pairs // CHAIN + num_long)
    terms = chain_sums[first_chains[pad(longest, (0, 1))[item]] + chain].double()
    # Surplus terms are summed into a last bag, which is discarded.
    bags = pad(first_terms, (0, 1), value=len(terms))
    sums[longest] = _sum_bags(torch.arange(len(terms), device=vectors.device), terms, bags, None)[:-1].to(sums.dtype)
    return sums


def _slots_of(sizes: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out M items of the given sizes [M] one after another on `total` slots.

    Returns:
        The item of each slot, or M beyond the last item; the number of the slot within its item; and the first slot
        of each item, followed by the end of the last, [M + 1].
    """
    first = pad(sizes.cumsum(0), (1, 0))
    slot = torch.arange(total, device=sizes.device)
    item = torch.searchsorted(first[1:], slot, right=True)
    return item, slot - first[item], first


def _sum_bags(source: Tensor, vectors: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """Sums of vectors[source] over [starts[i], starts[i + 1]), in order."""
    return embedding_bag(source, vectors, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)

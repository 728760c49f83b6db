from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..functional.checks import check_at_least, check_choice, check_floating, check_size
from ..functional.ema_update import ema_statistics
from ..functional.nearest_code import nearest_code
from .distributed import all_reduce_sum, farthest_vectors, num_ranks, sample_vectors
from .projection import to_unit_length

KMeansInit = Literal["k-means++", "random"]

# k-means++ selects from this many random vectors for each cluster, since it reads all of them once for each.
_SAMPLES_PER_CLUSTER = 32
_FEWEST_SAMPLES = 4096


class KMeansOutput(NamedTuple):
    """The result of `kmeans`, which describes the fields.

    >>> KMeansOutput._fields
    ('centroids', 'indices', 'inertia', 'iterations')
    """

    centroids: Tensor
    indices: Tensor
    inertia: Tensor
    iterations: int


def kmeans(
    x: Tensor,
    num_clusters: int,
    *,
    init: KMeansInit = "k-means++",
    iterations: int = 25,
    tolerance: float = 1e-4,
    seed: int = 0,
    sync: bool = True,
) -> KMeansOutput:
    """Cluster vectors by Lloyd's algorithm, with exact assignments; no N x K matrix, O(N + K D) memory beyond x.

    Each iteration moves every centroid to the mean of the vectors that are assigned to it. Empty clusters are moved to
    the vectors that are farthest from their centroids. A vector with NaN or infinity moves nothing.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides; no gradient.
        num_clusters: K.
        init: "k-means++" (each centroid is a vector drawn with a probability proportional to the squared distance to
            the nearest centroid before it, from a random sample of max(32 K, 4096) vectors) or "random" (K different
            vectors, while there are enough).
        iterations: the largest number of iterations, >= 0.
        tolerance: stop when an iteration reduces the inertia by at most this fraction, >= 0; 0 runs all iterations and
            never synchronises with the device.
        seed: of the random numbers; the random stream of torch is neither read nor changed.
        sync: cluster the vectors of all ranks of torch.distributed, if it is initialised. Every rank gets the same
            centroids, and the indices of its own vectors. Every rank must call it.
    Returns:
        centroids: [K, D] float32 (float64 for float64).
        indices: [...] int64: the nearest centroid of each vector.
        inertia: scalar float64: the sum of squared distances of the finite vectors to their centroids, of all ranks.
        iterations: the number of iterations.
        Equal inputs give bitwise equal results.
    Raises:
        ValueError: an argument is out of its range, or x holds no vectors (on several ranks the centroids are then 0).

    >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    >>> out = kmeans(x, 2)
    >>> sorted(out.centroids.flatten().tolist()), float(out.inertia)
    ([0.5, 10.5], 1.0)

    Source: Lloyd 1982, doi:10.1109/TIT.1982.1056489; k-means++: Arthur and Vassilvitskii 2007.
    """
    check_floating("x", x)
    if x.ndim == 0:
        raise ValueError("expected x of shape [..., D], got ()")
    num_clusters = check_size("num_clusters", num_clusters, 1)
    iterations = check_size("iterations", iterations, 0)
    check_at_least("tolerance", tolerance, 0)
    check_choice("init", init, get_args(KMeansInit))
    if x.numel() == 0 and num_ranks(sync) == 1:
        raise ValueError(f"expected x to hold at least one vector, got shape {tuple(x.shape)}")
    x = x.detach()
    return lloyd(x, initial_centroids(x, num_clusters, init, seed, sync), iterations, tolerance=tolerance, sync=sync)


@torch.no_grad()
def initial_centroids(x: Tensor, num_clusters: int, init: KMeansInit, seed: int, sync: bool) -> Tensor:
    """The centroids [K, D] before the first iteration, equal on all ranks."""
    # Ranks draw different numbers of random numbers for the sample.
    for_sample, for_selection = (torch.Generator(x.device).manual_seed(seed) for _ in range(2))
    count = num_clusters if init == "random" else max(_SAMPLES_PER_CLUSTER * num_clusters, _FEWEST_SAMPLES)
    if init == "k-means++" and num_ranks(sync) == 1:
        count = max(num_clusters, min(count, x[..., 0].numel()))
    jitter = torch.rand(count, generator=for_sample, device=x.device)
    sampled = all_reduce_sum(sample_vectors(x, jitter, sync), sync)
    # Valid vectors are repeated if there are fewer than clusters.
    valid_first = sampled[:, -1].argsort(descending=True, stable=True)
    place = torch.arange(count, device=x.device) % sampled[:, -1].sum().clamp(min=1).long()
    sample, is_valid = sampled[valid_first[place]].split([x.shape[-1], 1], dim=1)
    if init == "random":
        return sample[:num_clusters]
    return sample[_plus_plus(sample, is_valid.squeeze(1), num_clusters, for_selection)]


def _plus_plus(sample: Tensor, is_valid: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Positions [K] in the sample [S, D] of the centroids of k-means++."""
    # Distances of centred vectors lose fewer digits in |x|^2 - 2 x.c + |c|^2.
    centred = (sample - sample.sum(0) / is_valid.sum().clamp(min=1)) * is_valid[:, None]
    norms = centred.square().sum(1)
    weights, positions = is_valid, []
    for i in range(num_clusters):
        # The smallest of exponential random numbers divided by weights is one drawn by the weights.
        position = (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(0, keepdim=True)
        products = (centred @ centred[position].T).squeeze(1)
        distances = (norms - 2 * products + norms[position]).clamp_(min=0).index_fill_(0, position, 0) * is_valid
        weights = distances if i == 0 else torch.minimum(weights, distances)
        positions.append(position)
    return torch.cat(positions)


@torch.no_grad()
def lloyd(
    x: Tensor,
    centroids: Tensor,
    iterations: int,
    *,
    tolerance: float = 0.0,
    sync: bool = True,
    unit_length: bool = False,
) -> KMeansOutput:
    """The iterations of `kmeans` on vectors x [..., D], from given centroids [K, D] in float32 or wider.

    With `unit_length` the means are divided by their lengths (spherical k-means), for vectors of length 1. Without a
    tolerance it never reads values on the host, and can be compiled whole.
    """
    num_clusters, dim = centroids.shape
    indices, distances = nearest_code(x, centroids, return_distance=True)
    inertia, done = _inertia(distances, sync), 0
    while done < iterations:
        done += 1
        statistics = ema_statistics(x, indices, num_clusters)
        # One all-reduce adds sums, counts and candidates.
        packed = torch.cat([statistics, farthest_vectors(x, distances, num_clusters, sync)], dim=1)
        sums, counts, candidates, is_valid = all_reduce_sum(packed, sync).split([dim, 1, dim, 1], dim=1)
        # The i-th empty cluster gets the i-th candidate, or stays where it is if there are not so many.
        is_empty = counts == 0
        valid_first = is_valid.squeeze(1).argsort(descending=True, stable=True)
        candidate = valid_first[(is_empty.squeeze(1).cumsum(0) - 1).clamp(min=0)]
        moved = torch.where(is_valid[candidate] > 0, candidates[candidate], centroids)
        centroids = torch.where(is_empty, moved, sums / counts)
        if unit_length:
            centroids = to_unit_length(centroids)
        indices, distances = nearest_code(x, centroids, return_distance=True)
        before, inertia = inertia, _inertia(distances, sync)
        if tolerance > 0 and bool(before - inertia <= tolerance * before):
            break
    return KMeansOutput(centroids, indices, inertia, done)


def _inertia(distances: Tensor, sync: bool) -> Tensor:
    return all_reduce_sum(torch.where(distances.isfinite(), distances, 0).sum(dtype=torch.float64), sync)

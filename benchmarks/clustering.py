"""The entry of k-means: ten iterations of Lloyd's algorithm from the first K vectors, without the initialisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from dlvae_kernels import nearest_code
from dlvae_kernels.layers.kmeans import lloyd

from . import baselines, judge, sizes
from .calls import Call, MissingError, Tensors, needs
from .entry import Entry, Implementation, Signature, Tolerance, Verdict, Work
from .inputs import Inputs

_ITERATIONS = 10
# A near tie that rounding decides can lead to another local minimum; an empty cluster is moved or not.
_EXCESS = 1e-2
# The inertia is that of this many vectors, the first, and of all for a smaller size.
_SAMPLE = 16_384
# Plain PyTorch is left out on the CPU if its N x K matrices, of which there are three at a time, take more memory.
_MOST_BYTES = 8e9

_CLUSTER = Signature(lambda inputs: (inputs.x, inputs.x[: inputs.size.k].float()))


def _centroids(x: Tensor, centroids: Tensor) -> Tensor:
    return lloyd(x, centroids, _ITERATIONS).centroids


def _plain(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    if inputs.x.device.type == "cpu" and 3 * 4 * inputs.size.n * inputs.size.k > _MOST_BYTES:
        raise MissingError(f"its N x K matrices take more than {_MOST_BYTES / 1e9:.0f} GB")
    return _lloyd


def _lloyd(x: Tensor, centroids: Tensor) -> Tensor:
    for _ in range(_ITERATIONS):
        indices = baselines.argmin(x, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, indices, x)
        counts = torch.bincount(indices, minlength=len(centroids))[:, None]
        centroids = torch.where(counts > 0, sums / counts, centroids)
    return centroids


def _faiss(inputs: Inputs) -> Call:
    """`faiss.Kmeans` on all vectors; an empty cluster gets half of a large one."""
    needs("cpu", inputs)
    x, (n, k, d) = inputs.x.numpy(), (inputs.size.n, inputs.size.k, inputs.size.d)
    options = {"niter": _ITERATIONS, "min_points_per_centroid": 1, "max_points_per_centroid": n}
    make = baselines.library("faiss").Kmeans

    def forward() -> Tensor:
        clustering = make(d, k, **options)
        clustering.train(x, init_centroids=x[:k])
        return torch.from_numpy(clustering.centroids)

    return Call(forward)


def _scikit_learn(inputs: Inputs) -> Call:
    needs("cpu", inputs)
    x, k = inputs.x.numpy(), inputs.size.k
    make = baselines.library("sklearn.cluster").KMeans
    clustering = make(k, init=x[:k], n_init=1, max_iter=_ITERATIONS, tol=0, algorithm="lloyd")
    return Call(lambda: torch.from_numpy(clustering.fit(x).cluster_centers_))


def _judge(inputs: Inputs, answer: Tensors, gradients: object, tolerance: Tolerance) -> Verdict:
    """Judge centroids [K, D] by the float64 inertia of a sample, which may exceed that of `_reference` by `_EXCESS`."""
    (centroids,) = answer
    error = max(0.0, _inertia(inputs, centroids) / _inertia(inputs, _reference(inputs)) - 1)
    return Verdict(None, error, not error <= _EXCESS)


@lru_cache(maxsize=1)
def _reference(inputs: Inputs) -> Tensor:
    """The centroids [K, D] of float64 means. `nearest_code`, which has a judge of its own, assigns the vectors."""
    centroids = inputs.x[: inputs.size.k].double()
    for _ in range(_ITERATIONS):
        sums = torch.zeros_like(centroids)
        indices = nearest_code(inputs.x, centroids.float())
        counts = torch.bincount(indices, minlength=len(centroids))[:, None]
        for rows in judge.chunks(inputs):
            sums.index_add_(0, indices[rows], inputs.x[rows].double())
        centroids = torch.where(counts > 0, sums / counts, centroids)
    return centroids


def _inertia(inputs: Inputs, centroids: Tensor) -> float:
    """The sum of the squared distances of a sample to its nearest centroids, in float64."""
    sample = inputs.x[:_SAMPLE].split(_SAMPLE // 16)
    return float(sum(baselines.distances(x.double(), centroids.double()).amin(1).sum() for x in sample))


KMEANS = Entry(
    "kmeans",
    "tests/layers/test_kmeans.py",
    ("nearest_code", "ema_statistics"),
    {"cpu": (sizes.CLUSTERS, sizes.CLUSTERS_SMALL), "cuda": (sizes.CLUSTERS,)},
    (
        *_CLUSTER.library(_centroids),
        _CLUSTER.chosen("plain PyTorch", _plain),
        Implementation("faiss-cpu", _faiss, package="faiss-cpu"),
        Implementation("scikit-learn", _scikit_learn, package="scikit-learn"),
    ),
    _judge,
    Work(pairs=_ITERATIONS, vectors=_ITERATIONS, codes=_ITERATIONS),
)

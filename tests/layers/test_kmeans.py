from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dlvae_kernels import kmeans, use_backend
from dlvae_kernels.layers.distributed import farthest_vectors
from dlvae_kernels.testing import assert_same_codes
from tests.allocations import Allocations

module = importlib.import_module("dlvae_kernels.layers.kmeans")


def blobs(count: int = 12, each: int = 60, d: int = 5, spread: float = 0.1) -> Tensor:
    """Vectors around `count` centres that lie far apart."""
    centres = 10 * torch.randn(count, d)
    return (centres[:, None] + spread * torch.randn(count, each, d)).flatten(0, 1)


def formula(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm in float64; no cluster may become empty."""
    x, centroids = x.double(), centroids.double()
    for _ in range(iterations):
        indices = torch.cdist(x, centroids).argmin(1)
        centroids = torch.stack([x[indices == k].mean(0) for k in range(len(centroids))])
    distances, indices = torch.cdist(x, centroids).min(1)
    return centroids, indices, distances.square().sum()


@pytest.mark.small
def test_kmeans_two_clusters_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [20.0, 0.0], [20.0, 4.0]])
    out = kmeans(x, 2)
    assert sorted(out.centroids.tolist()) == [[1, 0], [20, 2]]
    assert out.indices[0] == out.indices[1] != out.indices[2] == out.indices[3]
    assert float(out.inertia) == 1 + 1 + 4 + 4
    assert kmeans(x, 1, iterations=0).iterations == 0
    assert kmeans(x, 1).centroids.tolist() == [[10.5, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.float64)])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_lloyd_matches_float64(dtype, iterations):
    x = torch.randn(500, 6).to(dtype)
    out = module.lloyd(x, x[:8].clone(), iterations)
    centroids, indices, inertia = formula(x, x[:8], iterations)
    torch.testing.assert_close(out.centroids.double(), centroids, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.inertia, inertia, rtol=1e-5, atol=0)
    assert (out.indices != indices).sum() <= 1
    assert out.iterations == iterations


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_kmeans_result_is_consistent(init):
    x = torch.randn(3, 100, 4)
    out = kmeans(x, 9, init=init, iterations=60, tolerance=1e-7)
    assert out.indices.shape == (3, 100)
    assert_same_codes(out.indices, x, out.centroids)
    distances = (x - out.centroids[out.indices]).double().square().sum()
    torch.testing.assert_close(out.inertia, distances, rtol=1e-6, atol=0)
    # It has converged: every centroid is the mean of its vectors.
    assert out.iterations < 60
    for k in range(9):
        torch.testing.assert_close(out.centroids[k], x[out.indices == k].mean(0), rtol=1e-4, atol=1e-4)


def test_kmeans_plus_plus_finds_separate_clusters():
    found = []
    for seed in range(5):
        x = blobs()
        within = float((x.view(12, 60, 5) - x.view(12, 60, 5).mean(1, keepdim=True)).square().sum())
        found.append(float(kmeans(x, 12, seed=seed).inertia) / within)
    assert sorted(found)[3] == pytest.approx(1, rel=1e-4)


def test_kmeans_plus_plus_draws_by_squared_distances():
    x, draws = torch.tensor([[0.0], [1.0], [3.0]]), 3000
    counts = torch.zeros(3, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        first, second = module._plus_plus(x, torch.ones(3), 2, generator)
        counts[first, second] += 1
    expected = draws / 3 * torch.tensor([[0, 1 / 10, 9 / 10], [1 / 5, 0, 4 / 5], [9 / 13, 4 / 13, 0]])
    # Five standard deviations of a count.
    assert ((counts - expected).abs() <= 5 * (expected + 1).sqrt() * (expected > 0)).all()


def test_kmeans_random_starts_with_different_vectors_of_x():
    x = torch.randn(50, 3)
    centroids = kmeans(x, 40, init="random", iterations=0).centroids
    assert len(centroids.unique(dim=0)) == 40
    assert (centroids[:, None] == x).all(2).any(1).all()


def test_lloyd_empty_clusters_move_to_the_farthest_vectors():
    x = torch.cat([torch.randn(50, 2), torch.tensor([[100.0, 0.0], [0.0, 70.0]])])
    centroids = torch.tensor([[0.0, 0.0], [-500.0, -500.0], [-600.0, -600.0]])
    after = module.lloyd(x, centroids, 1).centroids
    assert after[1:].tolist() == [[100, 0], [0, 70]]
    # The next iteration takes these vectors out of the mean of the first cluster.
    torch.testing.assert_close(module.lloyd(x, centroids, 2).centroids[0], x[:50].mean(0))


def test_farthest_vectors_of_any_strides_are_those_of_the_largest_distances():
    x = torch.randn(2, 5, 3, 4).permute(0, 2, 3, 1)
    distances = torch.rand(2, 3, 4)
    distances[0, 1, 2], distances[1, 2, 3] = torch.nan, 0
    found = farthest_vectors(x, distances, 30, False)
    order = distances.nan_to_num(-1).flatten().argsort(descending=True)[:22]
    assert torch.equal(found[:22, :-1], x.reshape(-1, 5)[order])
    assert found[:, -1].tolist() == [1] * 22 + [0] * 8
    assert not found[22:].any()
    assert torch.equal(farthest_vectors(x[0, 0, 0], torch.tensor(3.0), 1, False)[0, :-1], x[0, 0, 0])


def test_kmeans_fewer_different_vectors_than_clusters_gives_no_zero_centroid():
    x = (5 + torch.arange(4.0))[:, None].expand(4, 3).repeat(10, 1)
    for init in ("k-means++", "random"):
        out = kmeans(x, 9, init=init)
        assert float(out.inertia) == 0
        assert len(out.indices.unique()) == 4
        assert (out.centroids[:, None] == x).all(2).any(1).all()
    few = kmeans(x[:2], 9).centroids
    assert (few[:, None] == x[:2]).all(2).any(1).all()


def test_kmeans_vectors_that_are_not_finite_move_nothing():
    x = blobs(4)
    bad = torch.cat([torch.full((3, 5), torch.nan), x, torch.full((2, 5), torch.inf)])
    for init in ("k-means++", "random"):
        out = kmeans(bad, 4, init=init)
        assert out.centroids.isfinite().all()
        assert out.inertia.isfinite()
        torch.testing.assert_close(out.inertia, module.lloyd(x, out.centroids, 0).inertia)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_kmeans_starts_with_finite_vectors_alone(init):
    x = blobs(4)
    bad = torch.cat([torch.full((1000, 5), torch.nan), 100 + x])
    centroids = kmeans(bad, 30, init=init, iterations=0).centroids
    assert (centroids[:, None] == 100 + x).all(2).any(1).all()


def test_kmeans_same_seed_is_bitwise_equal_and_leaves_the_random_stream():
    x = torch.randn(400, 8)
    state = torch.get_rng_state()
    first, again, other = kmeans(x, 10, seed=3), kmeans(x, 10, seed=3), kmeans(x, 10, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.centroids, other.centroids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kmeans_half_precision_has_float32_centroids(dtype):
    x = blobs(4).to(dtype)
    out = kmeans(x, 4)
    assert out.centroids.dtype == torch.float32
    torch.testing.assert_close(out.centroids, kmeans(x.float(), 4).centroids)


def test_kmeans_any_strides_match_contiguous():
    x = torch.randn(2, 5, 6, 7).permute(0, 2, 3, 1)
    found, expected = kmeans(x, 6), kmeans(x.contiguous(), 6)
    assert found.indices.shape == (2, 6, 7)
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value)


def test_kmeans_tolerance_stops_and_zero_runs_all_iterations():
    x = blobs(4)
    assert kmeans(x, 4, iterations=30).iterations < 10
    assert kmeans(x, 4, iterations=30, tolerance=0).iterations == 30


def test_lloyd_compiled_whole_matches_eager():
    x, centroids = torch.randn(200, 4), torch.randn(6, 4)
    compiled = torch.compile(lambda x, c: module.lloyd(x, c, 3)[:3], fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x, centroids), module.lloyd(x, centroids, 3), strict=False):
        torch.testing.assert_close(actual, expected)


def test_kmeans_allocates_no_n_by_k_matrix():
    n, k, d = 30_000, 1_000, 4
    with use_backend("reference"), Allocations() as found:
        kmeans(torch.randn(n, d), k, iterations=1)
    # A chunk of the reference, below N * K.
    assert found.elements <= 2**21 < n * k, found.operation


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans(torch.zeros(()), 2), r"expected x of shape \[..., D\], got \(\)"),
        (lambda: kmeans(torch.zeros(0, 3), 2), r"expected x to hold at least one vector, got shape \(0, 3\)"),
        (lambda: kmeans(torch.zeros(4, 3).int(), 2), r"expected x of dtype .*, got torch.int32"),
        (lambda: kmeans(torch.zeros(4, 3), 0), r"expected num_clusters to be an integer of at least 1, got 0"),
        (lambda: kmeans(torch.zeros(4, 3), 2, iterations=-1), r"expected iterations .* at least 0, got -1"),
        (lambda: kmeans(torch.zeros(4, 3), 2, tolerance=-1.0), r"expected tolerance to be at least 0, got -1.0"),
        (
            lambda: kmeans(torch.zeros(4, 3), 2, init="x"),
            r"expected init to be one of 'k-means.*', 'random', got 'x'",
        ),
    ],
)
def test_kmeans_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SIZES = {"even": (150, 150), "uneven": (20, 280), "an empty rank": (0, 300)}


def _parts(case: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return list(torch.randn(300, 3, generator=generator).split(SIZES[case]))


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for case in SIZES:
        x = _parts(case)[rank]
        results[case, "lloyd"] = tuple(module.lloyd(x, torch.cat(_parts(case))[:7], 5))
        # One cluster starts empty.
        far = torch.cat([torch.cat(_parts(case))[:6], torch.full((1, 3), 1e3)])
        results[case, "empty cluster"] = tuple(module.lloyd(x, far, 5))
        for init in ("k-means++", "random"):
            results[case, init] = tuple(kmeans(x, 7, init=init))
    results["own"] = tuple(kmeans(_parts("even")[rank], 7, sync=False))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The results of each rank."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", SIZES)
def test_lloyd_of_two_ranks_is_that_of_one_process(ranks, case):
    x = torch.cat(_parts(case))
    expected = module.lloyd(x, x[:7], 5)
    for rank in ranks:
        torch.testing.assert_close(rank[case, "lloyd"][0], expected.centroids)
        torch.testing.assert_close(rank[case, "lloyd"][2], expected.inertia)
    assert torch.equal(torch.cat([rank[case, "lloyd"][1] for rank in ranks]), expected.indices)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("kind", ["empty cluster", "k-means++", "random"])
def test_kmeans_two_ranks_hold_equal_centroids_of_the_full_batch(ranks, case, kind):
    first, second = (rank[case, kind] for rank in ranks)
    assert torch.equal(first[0], second[0])
    assert first[3] == second[3]
    x = torch.cat(_parts(case))
    expected = module.lloyd(x, first[0], 0)
    torch.testing.assert_close(first[2], expected.inertia)
    assert torch.equal(torch.cat([first[1], second[1]]), expected.indices)
    assert len(expected.indices.unique()) == 7
    one = kmeans(x, 7) if kind != "empty cluster" else expected
    assert float(first[2]) < 1.3 * float(one.inertia)


def test_kmeans_two_ranks_without_sync_hold_their_own_centroids(ranks):
    for rank, x in zip(ranks, _parts("even"), strict=True):
        assert torch.equal(rank["own"][0], kmeans(x, 7).centroids)

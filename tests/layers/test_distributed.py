"""Two processes over gloo against one process on the full batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dlvae_kernels import VectorQuantizer, VectorQuantizerEMA
from dlvae_kernels.layers import distributed

K, D, STEPS = 16, 4, 5


def _layer(kind: str, **options) -> torch.nn.Module:
    torch.manual_seed(5)
    if kind == "ema":
        return VectorQuantizerEMA(K, D, 0.25, 0.8, **options)
    return VectorQuantizer(K, D, 0.25, **options)


def _batches(sizes: tuple[int, int]) -> list[list[torch.Tensor]]:
    """For each step the batch of each rank: sizes[rank] maps of 6 positions."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(size, D, 6, generator=generator) for size in sizes] for _ in range(STEPS)]


def _train(layer, steps, rank):
    for step in steps:
        layer(step[rank])
    return {name: value.clone() for name, value in layer.state_dict().items()}


def _work(rank: int, folder: str, cases: list[tuple]) -> None:
    torch.set_num_threads(1)
    # The layer is constructed before torch.distributed is initialised, which each forward has to check anew.
    layers = [_layer(kind, **options) for kind, options, _, _ in cases]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for layer, (_, _, sizes, compiled) in zip(layers, cases, strict=True):
        torch.manual_seed(100 + rank)
        function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        for step in _batches(sizes):
            function(step[rank])
        results.append(layer.state_dict())
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


CASES = {
    "ema": ("ema", {}, (4, 4), False),
    "ema, uneven": ("ema", {}, (1, 7), False),
    "ema, compiled": ("ema", {}, (4, 4), True),
    "ema, not synchronised": ("ema", {"sync": False}, (4, 4), False),
    "ema, data and dead codes": ("ema", {"init": "data", "dead_code_threshold": 1.0}, (4, 4), False),
    "ema, kmeans": ("ema", {"init": "kmeans"}, (4, 4), False),
    "ema, an empty rank": ("ema", {"init": "data", "dead_code_threshold": 1.0}, (4, 0), False),
    "gradient, revival": ("gradient", {"init": "kmeans", "dead_code_threshold": 2.0}, (4, 4), False),
    "gradient, an empty rank": ("gradient", {"init": "data", "dead_code_threshold": 2.0}, (0, 4), False),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, dict]]:
    """The state of each rank after training, for each case."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(_work, args=(str(folder), list(CASES.values())), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    return {name: pair for name, *pair in zip(CASES, first, second, strict=True)}


@pytest.mark.parametrize("case", ["ema", "ema, uneven", "ema, compiled"])
def test_two_ranks_equal_one_process_on_the_full_batch(ranks, case):
    kind, options, sizes, _ = CASES[case]
    single = _train(_layer(kind, **options), [[torch.cat(step)] for step in _batches(sizes)], 0)
    for state in ranks[case]:
        for name, expected in single.items():
            torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [name for name in CASES if name != "ema, not synchronised"])
def test_two_ranks_hold_bitwise_equal_states(ranks, case):
    first, second = ranks[case]
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(torch.isfinite(value).all() for value in first.values())


def test_two_ranks_without_sync_hold_their_own_states(ranks):
    first, second = ranks["ema, not synchronised"]
    assert not torch.allclose(first["_embedding.weight"], second["_embedding.weight"], atol=1e-3)
    single = _train(_layer("ema"), _batches((4, 4)), 1)
    torch.testing.assert_close(second, copy.deepcopy(single))


def test_sample_vectors_two_ranks_draw_from_all_without_repeats(monkeypatch):
    rows = torch.arange(16.0).view(2, 8, 1)
    sampled = torch.zeros(16, 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "_world", lambda sync, rank=rank: (rank, 2))
        sampled += distributed.sample_vectors(rows[rank], 16, True)
    assert sorted(sampled[:, 0].tolist()) == list(range(16))
    assert (sampled[:, 1] == 1).all()

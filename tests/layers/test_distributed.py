"""Two processes over gloo against one process on the full batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dlvae_kernels import (
    GroupedResidualVectorQuantizer,
    ResidualVectorQuantizer,
    VectorQuantizer,
    VectorQuantizerEMA,
)
from dlvae_kernels.layers import distributed

K, D, STEPS = 16, 4, 5


def _layer(kind: str, **options) -> torch.nn.Module:
    torch.manual_seed(5)
    if kind == "ema":
        return VectorQuantizerEMA(K, D, 0.25, 0.8, **{"dead_code_threshold": 0} | options)
    if kind == "residual":
        return ResidualVectorQuantizer(3, K, D, decay=0.8, **{"init": "normal", "dead_code_threshold": 0} | options)
    if kind == "grouped":
        options = {"init": "normal", "dead_code_threshold": 0} | options
        return GroupedResidualVectorQuantizer(2, 3, K, D, decay=0.8, **options)
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
    "ema, heads": ("ema", {"num_heads": 2}, (4, 4), False),
    "ema, heads, data and dead codes": (
        "ema",
        {"num_heads": 2, "init": "data", "dead_code_threshold": "auto"},
        (4, 4),
        False,
    ),
    "residual": ("residual", {}, (4, 4), False),
    "grouped": ("grouped", {}, (4, 4), False),
    "residual, dropout": ("residual", {"quantizer_dropout": True, "dead_code_threshold": "auto"}, (4, 4), False),
    "residual, uneven": ("residual", {}, (1, 7), False),
    "residual, kmeans and dead codes": ("residual", {"init": "kmeans", "dead_code_threshold": 1.0}, (4, 4), False),
    "residual, an empty rank": ("residual", {"init": "data", "dead_code_threshold": "auto"}, (4, 0), False),
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


@pytest.mark.parametrize(
    "case", ["ema", "ema, uneven", "ema, compiled", "ema, heads", "residual", "residual, uneven", "grouped"]
)
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


COUNTS = (3, 5)


def _entropy_of_means(rank: int, logits: torch.Tensor, bias: torch.Tensor, sync: bool) -> torch.Tensor:
    """Entropy of the mean softmax, plus a term of the own vectors."""
    own = logits[sum(COUNTS[:rank]) : sum(COUNTS[: rank + 1])] if sync else logits
    probabilities = (own + bias).softmax(1)
    mean = distributed.all_reduce_mean(probabilities.mean(0), len(own), sync)
    return -(mean * mean.log()).sum() + (probabilities[:, 0].sum() * 2 / sum(COUNTS) if sync else 0)


def _work_on_means(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    logits, bias = torch.load(f"{folder}/inputs.pt")
    bias.requires_grad_()
    value = _entropy_of_means(rank, logits, bias, True)
    value.backward()
    # Averages gradients, as DistributedDataParallel does.
    dist.all_reduce(bias.grad)
    empty = torch.full((4,), torch.nan, requires_grad=rank == 0)
    mean = distributed.all_reduce_mean(torch.ones(4) if rank else empty, 2 * rank, True)
    torch.save((value.detach(), bias.grad / 2, mean.detach()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_reduce_mean_two_ranks_equal_one_process_in_value_and_averaged_gradient(tmp_path):
    logits, bias = torch.randn(8, 4), torch.randn(4)
    torch.save((logits, bias), tmp_path / "inputs.pt")
    mp.spawn(_work_on_means, args=(str(tmp_path),), nprocs=2)
    bias.requires_grad_()
    entropy = _entropy_of_means(0, logits, bias, False)
    own = (logits + bias).softmax(1)[:, 0]
    (expected,) = torch.autograd.grad(entropy + own.mean(), bias)
    for rank, begin in enumerate((0, 3)):
        value, grad, mean = torch.load(tmp_path / f"{rank}.pt")
        rest = own[begin : begin + COUNTS[rank]].sum() * 2 / 8
        torch.testing.assert_close(value, (entropy + rest).detach())
        torch.testing.assert_close(grad, expected)
        # A rank without vectors has a mean of NaN.
        assert torch.equal(mean, torch.ones(4))


def test_sample_vectors_two_ranks_draw_from_all_without_repeats(monkeypatch):
    rows = torch.arange(16.0).view(2, 8, 1)
    sampled = torch.zeros(16, 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "_world", lambda sync, rank=rank: (rank, 2))
        sampled += distributed.sample_vectors(rows[rank], torch.rand(16), True)
    assert sorted(sampled[:, 0].tolist()) == list(range(16))
    assert (sampled[:, 1] == 1).all()

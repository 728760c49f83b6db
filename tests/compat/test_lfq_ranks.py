"""LFQ and ResidualLFQ of the compatibility package in two processes over gloo against one on the whole batch."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dlvae_kernels.compat import vector_quantize_pytorch as own

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")
PACKAGES = {"own": own, "stock": stock}
# Arguments of LFQ, and the number of vectors of each rank.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "even": ({}, (6, 6)),
    "uneven": ({"spherical": True}, (2, 10)),
    "an_empty_rank": ({}, (0, 12)),
    "codebooks": ({"num_codebooks": 2, "codebook_size": 8, "dim": 6}, (6, 6)),
    "eval": ({}, (6, 6)),
}


def _inputs(case: str) -> tuple[Tensor, ...]:
    sizes = CASES[case][1]
    return torch.randn(sum(sizes), 5, 6, generator=torch.Generator().manual_seed(1)).split(sizes)


def _run(package: ModuleType, case: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The batch entropy and its gradient."""
    module = package.LFQ(**{"dim": 6, **CASES[case][0]}).train(case != "eval")
    x = x.clone().requires_grad_()
    _, terms = module(x, 1.0, True)
    entropy = terms.batch_entropy
    return entropy.detach(), torch.autograd.grad(entropy, x)[0] if entropy.requires_grad else torch.zeros_like(x)


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # vector-quantize-pytorch calls the all-reduce that torch deprecates, and has no gradient for an empty rank.
    results: dict[Any, Any] = {
        (name, case): _run(package, case, _inputs(case)[rank])
        for name, package in PACKAGES.items()
        for case in CASES
        if name == "own" or case == "even"
    }
    torch.manual_seed(rank)
    residual = own.ResidualLFQ(dim=4, codebook_size=16, num_quantizers=8, quantize_dropout=True)
    counts = [int((residual(torch.randn(1, 1, 4))[1] >= 0).sum()) for _ in range(10)]
    torch.save((results, counts), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, list[int]]]:
    """The results of each rank, and the number of levels that ran."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", ["even", "uneven", "an_empty_rank", "codebooks"])
def test_lfq_batch_entropy_of_two_ranks_is_that_of_one_process(ranks, case):
    entropy, grad = _run(own, case, torch.cat(_inputs(case)))
    for results, _ in ranks:
        torch.testing.assert_close(results["own", case][0], entropy)
    # The average over ranks of the gradients of a parameter is that of one process, so here twice its gradient.
    found = torch.cat([results["own", case][1] for results, _ in ranks]) / 2
    torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-6)


def test_lfq_batch_entropy_of_vector_quantize_pytorch_ignores_the_other_rank(ranks):
    entropy, _ = _run(stock, "even", torch.cat(_inputs("even")))
    for results, _ in ranks:
        assert abs(float(results["stock", "even"][0] - entropy)) > 0.1


def test_lfq_eval_has_no_entropy_on_any_rank(ranks):
    assert all(float(results["own", "eval"][0]) == 0 for results, _ in ranks)


def test_residual_lfq_dropout_runs_the_same_levels_on_all_ranks(ranks):
    (_, first), (_, second) = ranks
    assert first == second
    assert len(set(first)) > 1

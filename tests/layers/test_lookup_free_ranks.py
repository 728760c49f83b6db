"""LookupFreeQuantizer in two processes over gloo against one process on the full batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dlvae_kernels import LookupFreeQuantizer
from dlvae_kernels.layers.lookup_free_quantizer import LookupFreeQuantizerOutput

CASES = {
    "even": ({}, (6, 6), False),
    "uneven": ({"entropy_loss_weight": 1.0}, (2, 10), False),
    "an empty rank": ({}, (0, 12), False),
    "compiled": ({"num_codebooks": 2}, (6, 6), True),
    "not synchronised": ({"sync": False}, (6, 6), False),
    "eval": ({}, (6, 6), False),
}


def _layer(case: str) -> LookupFreeQuantizer:
    options, _, _ = CASES[case]
    return LookupFreeQuantizer(dim=6, inv_temperature=1.5, **options).train(case != "eval")


def _inputs(case: str) -> tuple[list[Tensor], list[Tensor]]:
    """Maps of 5 positions and their masks, one for each rank."""
    _, sizes, _ = CASES[case]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 6, 5, generator=generator)
    mask = torch.rand(sum(sizes), 5, generator=generator) < 0.7
    return list(x.split(sizes)), list(mask.split(sizes))


def _run(case: str, x: Tensor, mask: Tensor) -> tuple[LookupFreeQuantizerOutput, Tensor]:
    """The outputs, and the gradient of the batch entropy."""
    layer, x = _layer(case), x.clone().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager") if CASES[case][2] else layer
    out = compiled(x, mask)
    return out, torch.autograd.grad(out.batch_entropy, x)[0]


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for case in CASES:
        x, mask = _inputs(case)
        out, grad = _run(case, x[rank], mask[rank])
        results[case] = out.batch_entropy.detach(), out.per_sample_entropy.detach(), grad
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """The results of each rank, for each case."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    return first, second


@pytest.mark.parametrize("case", ["even", "uneven", "an empty rank", "compiled"])
def test_lfq_batch_entropy_of_two_ranks_is_that_of_one_process(ranks, case):
    x, mask = _inputs(case)
    out, grad = _run(case, torch.cat(x), torch.cat(mask))
    for rank in ranks:
        torch.testing.assert_close(rank[case][0], out.batch_entropy)
    # The average over ranks of the gradients of a parameter is that of one process, so here twice its gradient.
    found = torch.cat([rank[case][2] for rank in ranks]) / 2
    torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["not synchronised", "eval"])
def test_lfq_ranks_that_do_not_all_reduce_have_their_own_entropy(ranks, case):
    for rank, (x, mask) in zip(ranks, zip(*_inputs(case), strict=True), strict=True):
        out, grad = _run(case, x, mask)
        torch.testing.assert_close(rank[case], (out.batch_entropy.detach(), out.per_sample_entropy.detach(), grad))

"""A model sharded by FSDP2, over gloo, against the unsharded model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.build import build_model
from models.training.config import Config
from models.training.ranks import Ranks
from models.training.step import Objective

from ..runs import spawn

pytestmark = pytest.mark.slow

STEPS = 4
SMALL = {"hiddens": 16, "residual_hiddens": 8, "num_embeddings": 32, "embedding_dim": 8, "sparsity_level": 4}
CASES = {
    "vqvae-ema": Config(model="vqvae-ema", init="normal", dead_code_threshold=0.0, **SMALL),
    "vqvae": Config(model="vqvae", init="uniform", dead_code_threshold=0.0, **SMALL),
    "dlvae": Config(model="dlvae", sparsity=0.1, **SMALL),
}
# Vectors drawn from the batch: they depend on the number of ranks.
DRAWN = "vqvae-ema, data and revival"
CASES[DRAWN] = Config(model="vqvae-ema", init="data", dead_code_threshold=1.0, **SMALL)


def _model(case: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return build_model(CASES[case], 3)


def _losses(model: torch.nn.Module, objective: torch.nn.Module, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for images in parts:
        loss, _, _ = objective(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(8, 3, 32, 32, generator=generator) for _ in range(STEPS)]


def _work(ranks: Ranks, folder: Path) -> None:
    results = {}
    for case in CASES:
        objective = Objective(model := _model(case), 1.0)
        # The outermost module holds the 1x1 convolution and the codebook.
        for part in (model._encoder, model._decoder, objective):
            fully_shard(part)
        sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
        losses = torch.stack(_losses(model, objective, [batch.chunk(2)[ranks.rank] for batch in _batches()]))
        ranks.sum(losses)
        codes = model.codes.full_tensor() if isinstance(model.codes, DTensor) else model.codes
        results[case] = sharded, losses / 2, codes
    torch.save(results, folder / f"{ranks.rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    spawn(_work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [case for case in CASES if case != DRAWN])
def test_sharded_model_equals_unsharded_model(case, ranks):
    model = _model(case)
    before = copy.deepcopy(model.codes.detach())
    expected = torch.stack(_losses(model, Objective(model, 1.0), _batches()))
    assert (model.codes - before).abs().max() > 1e-3
    for sharded, losses, codes in (each[case] for each in ranks):
        assert sharded
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(codes, model.codes.detach(), rtol=1e-5, atol=1e-5)


def test_codes_drawn_from_the_batch_are_equal_on_all_ranks(ranks):
    first, second = (each[DRAWN][2] for each in ranks)
    assert torch.equal(first, second)
    assert (first.abs().sum(1) > 0).all()

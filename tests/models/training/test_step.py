"""An update neither reads a value nor mixes devices, as a CUDA graph requires; tested without a GPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from models.autoencoder import perplexity
from models.build import build_model
from models.training.batches import Order, ResidentBatches, StreamedBatches
from models.training.config import Config
from models.training.ranks import Ranks
from models.training.step import Objective, Step, make_schedule, rate_factor

SMALL = {"hiddens": 16, "residual_hiddens": 8, "num_embeddings": 32, "embedding_dim": 8, "sparsity_level": 4}
KEPT = 4


def _step(kind="vqvae-ema", batches=ResidentBatches, device="cpu", autocast=nullcontext, **options):
    config = Config(model=kind, batch_size=4, updates=10, warmup=3, **SMALL, **options)
    device = torch.device(device)
    with device:
        model = build_model(config, 3)
        images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    # The state after the first update, which is not captured.
    for layer in model.modules():
        if hasattr(layer, "_is_uninitialised"):
            layer._is_uninitialised = False
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    source = batches(images, Order(20, 4, 0), device, True)
    return Step(Objective(model, 1.0), optimizer, source, autocast, config.num_embeddings, KEPT, device)


@pytest.mark.parametrize("batches", [ResidentBatches, StreamedBatches])
@pytest.mark.parametrize("kind", ["vqvae-ema", "vqvae", "dlvae"])
def test_step_reads_no_value(kind, batches):
    # These tensors have no values: an operation that reads one raises.
    with FakeTensorMode():
        step = _step(kind, batches)
        step()
        step()


@pytest.mark.parametrize(
    "read",
    [
        lambda counts: counts.max().item(),
        lambda counts: counts[counts > 0],
        lambda counts: bool(counts.any()),
        torch.bincount,
    ],
)
def test_step_that_reads_a_value_raises(read):
    with FakeTensorMode():
        step = _step()
        forward = step._objective.model.code
        step._objective.model.code = lambda latents: (read(forward(latents).counts(32)), forward(latents))[1]
        with pytest.raises((DataDependentOutputException, torch._subclasses.fake_tensor.DynamicOutputShapeException)):
            step()


@pytest.mark.parametrize("kind", ["vqvae-ema", "vqvae", "dlvae"])
def test_forward_on_gpu_uses_no_tensor_of_the_host(kind):
    # A tensor of the host among those of the GPU raises here; backward and autocast would need the driver.
    with FakeTensorMode():
        step = _step(kind, device="cuda")
        loss, metrics, counts = step._objective(step._batches.take(step._clock))
    assert {each.device.type for each in (loss, metrics, counts)} == {"cuda"}
    assert loss.dtype == metrics.dtype == torch.float32


@pytest.mark.parametrize("updates", [1, 7, 1200, 200_000, 10**9])
@pytest.mark.parametrize(
    "options", [{"schedule": "constant"}, {"warmup": 0}, {"warmup": 50}, {"warmup": 10**9}], ids=str
)
def test_schedule_from_any_update_sets_rate_rounded_once(updates, options):
    config = Config(updates=updates, lr=2e-3, **options)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=torch.tensor(config.lr), fused=True)
    rate = optimizer.param_groups[0]["lr"]
    for update in (0, 1, 2, 49, 50, updates // 3, updates // 2, updates - 2, updates - 1):
        update = min(max(update, 0), updates - 1)
        schedule = make_schedule(config, optimizer, update)
        assert rate == torch.tensor(config.lr * rate_factor(config, update))
        optimizer.step()
        schedule.step()
        assert rate == torch.tensor(config.lr * rate_factor(config, update + 1))
    # A CUDA graph reads this tensor: it must not be replaced.
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("kind", ["vqvae-ema", "vqvae", "dlvae"])
def test_read_returns_metrics_of_last_updates(kind):
    step = _step(kind)
    seen, usages = [], []
    forward = step._objective.forward
    step._objective.forward = lambda images: seen.append(forward(images)) or seen[-1]
    for update in range(6):
        step._batches.prepare(update)
        step()
        usages.append(step._objective.model.usage or [torch.tensor(torch.nan)] * 3)
    rows = step.read(Ranks()).rows(2, 6)
    for row, (loss, metrics, counts), usage in zip(rows, seen[2:], usages[2:], strict=True):
        expected = metrics[0], loss, perplexity(counts), *usage
        assert row == pytest.approx([each.item() for each in expected], nan_ok=True)
        assert kind != "dlvae" or row.utilisation != row.utilisation
    if kind != "dlvae":
        # Four images give 64 vectors: codes that none is assigned to are revived, at most one in an update.
        assert 0 < rows[-1].revived <= 6
        assert all(1 <= row.usage_perplexity <= 32 and 0 < row.utilisation <= 1 for row in rows)

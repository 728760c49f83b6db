"""That an update neither looks at a value nor mixes devices: what a CUDA graph needs, tested without a GPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from models.autoencoder import perplexity
from models.batches import Order, ResidentBatches, StreamedBatches
from models.build import build_model
from models.config import Config
from models.ranks import Ranks
from models.step import Objective, Step, learning_rate, learning_rate_on_device

SMALL = {"hiddens": 16, "residual_hiddens": 8, "num_embeddings": 32, "embedding_dim": 8, "sparsity_level": 4}
KEEPS = 4


def _step(kind="vqvae-ema", batches=ResidentBatches, device="cpu", autocast=nullcontext, **options):
    config = Config(model=kind, batch_size=4, updates=10, warmup=3, **SMALL, **options)
    device = torch.device(device)
    with device:
        model = build_model(config, 3)
        images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    # As after the first update, which is not repeated.
    for layer in model.modules():
        if hasattr(layer, "_is_uninitialised"):
            layer._is_uninitialised = False
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    source = batches(images, Order(20, 4, 0), device, True)
    return Step(config, Objective(model, 1.0), optimizer, source, autocast, device, KEEPS)


@pytest.mark.parametrize("batches", [ResidentBatches, StreamedBatches])
@pytest.mark.parametrize("kind", ["vqvae-ema", "vqvae", "dlvae"])
def test_nothing_looks_at_a_value(kind, batches):
    # Tensors without values: whoever asks for one gets an exception.
    with FakeTensorMode():
        step = _step(kind, batches)
        step()
        step()


@pytest.mark.parametrize(
    "look", [lambda use: use.max().item(), lambda use: use[use > 0], lambda use: bool(use.any()), torch.bincount]
)
def test_a_look_at_a_value_would_be_seen(look):
    with FakeTensorMode():
        step = _step()
        forward = step._objective.model.code
        step._objective.model.code = lambda latents: (look(forward(latents).use(32)), forward(latents))[1]
        with pytest.raises((DataDependentOutputException, torch._subclasses.fake_tensor.DynamicOutputShapeException)):
            step()


@pytest.mark.parametrize("kind", ["vqvae-ema", "vqvae", "dlvae"])
def test_the_forward_on_a_gpu_takes_nothing_from_the_host(kind):
    # A tensor of the host among those of the GPU is an error here; a backward and autocast would need the driver.
    with FakeTensorMode():
        step = _step(kind, device="cuda")
        loss, nmse, use = step._objective(step._batches.take(step._clock))
    assert {each.device.type for each in (loss, nmse, use)} == {"cuda"}
    assert loss.dtype == nmse.dtype == torch.float32


def test_the_learning_rate_follows_the_clock():
    step = _step()
    for update in (0, 1, 2, 9):
        step.set_clock(update)
        step._batches.prepare(update)
        step()
        expected = learning_rate(Config(updates=10, warmup=3), update)
        assert step._optimizer.param_groups[0]["lr"].item() == pytest.approx(expected)


@pytest.mark.parametrize("updates", [1, 7, 1200, 200_000, 10**9])
@pytest.mark.parametrize(
    "options", [{"schedule": "constant"}, {"warmup": 0}, {"warmup": 50}, {"warmup": 10**9}], ids=str
)
def test_learning_rate_on_device_is_learning_rate_in_float32(updates, options):
    config = Config(updates=updates, lr=2e-3, **options)
    for update in (0, 1, 2, 49, 50, updates // 3, updates // 2, updates - 2, updates - 1):
        update = min(max(update, 0), updates - 1)
        rate = learning_rate_on_device(config, torch.tensor(update))
        assert rate.dtype == torch.float64
        expected = torch.tensor(learning_rate(config, update))
        assert (rate.float() - expected).abs() <= 2**-23 * expected
    last = learning_rate_on_device(config, torch.tensor(updates - 1))
    assert learning_rate_on_device(config, torch.tensor(updates + 5)) == last


def test_the_metrics_of_the_last_updates_are_kept():
    step = _step()
    seen = []
    forward = step._objective.forward
    step._objective.forward = lambda images: seen.append(forward(images)) or seen[-1]
    for update in range(6):
        step._batches.prepare(update)
        step()
    rows = step.read(Ranks()).rows(2, 6)
    for row, (loss, nmse, use) in zip(rows, seen[2:], strict=True):
        assert row == pytest.approx((nmse.item(), loss.item(), perplexity(use).item()))

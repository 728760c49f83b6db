"""One update of a model, as work of the device alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.profiler import record_function

from .autoencoder import Autoencoder, perplexity
from .batches import Batches
from .config import Config
from .ranks import Ranks

# Of an update, as a profile names them.
PARTS = ("batch", "encoder", "bottleneck", "decoder", "backward", "optimizer")


def learning_rate(config: Config, update: int) -> float:
    """Of an update, counted from 0."""
    if config.schedule == "constant":
        return config.lr
    warmup = min(1.0, (update + 1) / max(1, config.warmup))
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * update / config.updates))


def learning_rate_on_device(config: Config, clock: Tensor) -> Tensor:
    """`learning_rate` of the update in `clock`, a scalar int64: a scalar float64 on the device of `clock`."""
    if config.schedule == "constant":
        return torch.full_like(clock, config.lr, dtype=torch.float64)
    # Those who repeat the step beyond the last update keep its rate.
    update = clock.clamp(max=config.updates - 1).double()
    warmup = ((update + 1) / max(1, config.warmup)).clamp(max=1)
    return config.lr * warmup * 0.5 * (1 + torch.cos(math.pi * update / config.updates))


class Objective(nn.Module):
    """What is minimised: the normalised error of the reconstruction and the loss of the bottleneck, together."""

    def __init__(self, model: Autoencoder, variance: float) -> None:
        super().__init__()
        self.model = model
        self.variance = variance

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, C, H, W] in [0, 1] -> loss, normalised error, and how often each code was taken [K]."""
        with record_function("encoder"):
            latents = self.model.encode(images)
        with record_function("bottleneck"):
            coding = self.model.code(latents)
        with record_function("decoder"):
            reconstruction = self.model.decode(coding.latents)
        nmse = mse_loss(reconstruction.float(), images) / self.variance
        return nmse + coding.loss, nmse.detach(), coding.use(len(self.model.codes))


@dataclass(frozen=True)
class Reading:
    """Metrics on their way to the host."""

    _table: Tensor
    _arrives: torch.cuda.Event | None

    def rows(self, first: int, last: int) -> list[tuple[float, float, float]]:
        """(nmse, loss, perplexity) of the updates in [first, last), counted from 0; waits for them."""
        if self._arrives is not None:
            self._arrives.synchronize()
        table = self._table.tolist()
        return [tuple(table[update % len(table)]) for update in range(first, last)]


class Step:
    """An update: batch, forward, backward, optimizer and statistics.

    It neither looks at a value nor depends on one of the host: the number of the update, the learning rate and the
    metrics are tensors on the device, so that it never waits for it and a CUDA graph can repeat it.

    Args:
        objective: an `Objective`, or what wraps one.
        keeps: of how many updates the metrics are kept.
    """

    def __init__(
        self,
        config: Config,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        autocast: Callable[[], AbstractContextManager[Any]],
        device: torch.device,
        keeps: int,
    ) -> None:
        self._objective = objective
        self._optimizer = optimizer
        self._batches = batches
        self._autocast = autocast
        self._clock = torch.zeros((), dtype=torch.int64, device=device)
        self._config = config
        self._rate = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = self._rate
        # A row is (normalised error, loss, how often each code was taken); update u writes row u modulo `keeps`.
        self._metrics = torch.zeros(keeps, 2 + config.num_embeddings, device=device)

    def set_clock(self, update: int) -> None:
        """Go on with this update, counted from 0."""
        self._clock.fill_(update)

    def read(self, ranks: Ranks) -> Reading:
        """Ask for the metrics of the last updates, of all ranks together."""
        # A copy: where there are several ranks it is summed in place.
        summed = ranks.sum(self._metrics.clone())
        # The losses of a rank are means over its part of the batch; the parts are all of one size.
        table = torch.cat([summed[:, :2] / ranks.count, perplexity(summed[:, 2:])[:, None]], dim=1)
        host = torch.empty_like(table, device="cpu", pin_memory=table.is_cuda).copy_(table, non_blocking=True)
        event = torch.cuda.current_stream(table.device).record_event() if table.is_cuda else None
        return Reading(host, event)

    def __call__(self) -> None:
        self._rate.copy_(learning_rate_on_device(self._config, self._clock))
        with record_function("batch"):
            images = self._batches.take(self._clock)
        with self._autocast():
            loss, nmse, use = self._objective(images)
        with record_function("backward"):
            self._optimizer.zero_grad()
            loss.backward()
        with record_function("optimizer"):
            self._optimizer.step()
        row = torch.cat([torch.stack([nmse, loss.detach()]), use.float()])
        self._metrics.index_copy_(0, (self._clock % len(self._metrics)).view(1), row[None])
        self._clock.add_(1)

"""One update of a model, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR
from torch.profiler import record_function

from dlvae_kernels.layers.usage import CodebookUsage

from ..autoencoder import Autoencoder, perplexity
from .batches import Batches
from .config import Config
from .ranks import Ranks

# The metrics of an update that are means over the ranks.
NUM_MEANS = 5
# The parts of an update, as a profile names them.
PARTS = ("batch", "encoder", "bottleneck", "decoder", "backward", "optimizer")


def rate_factor(config: Config, update: int) -> float:
    """The learning rate of an update, counted from 0, relative to `config.lr`."""
    if config.schedule == "constant":
        return 1.0
    warmup = min(1.0, (update + 1) / max(1, config.warmup))
    return warmup * 0.5 * (1 + math.cos(math.pi * update / config.updates))


def make_schedule(config: Config, optimizer: torch.optim.Optimizer, update: int) -> LambdaLR:
    """The schedule of the learning rate, from an update on.

    It has a closed form, so that the number of the update restores it, also for another number of updates.
    """
    for group in optimizer.param_groups:
        # A Python float: the product with the factor is rounded to float32 once.
        group["initial_lr"] = config.lr
    return LambdaLR(optimizer, lambda number: rate_factor(config, number), last_epoch=update - 1)


class Objective(nn.Module):
    """The loss of training: the normalised reconstruction error plus the loss of the bottleneck."""

    def __init__(self, model: Autoencoder, variance: float) -> None:
        super().__init__()
        self.model = model
        self.variance = variance

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, C, H, W] in [0, 1] -> loss, metrics [5], and number of assignments of each code [K].

        The metrics are the normalised error, the loss, and perplexity, utilisation and revived codes of the usage.
        """
        with record_function("encoder"):
            latents = self.model.encode(images)
        with record_function("bottleneck"):
            coding = self.model.code(latents)
        with record_function("decoder"):
            reconstruction = self.model.decode(coding.latents)
        nmse = mse_loss(reconstruction.float(), images) / self.variance
        loss = nmse + coding.loss
        usage = self.model.usage or CodebookUsage(*nmse.new_full((3,), torch.nan))
        metrics = torch.stack([each.detach().float() for each in (nmse, loss, *usage)])
        return loss, metrics, coding.counts(len(self.model.codes))


class StepMetrics(NamedTuple):
    """The metrics of an update. Those of the usage are in the form of `CodebookUsage`, and NaN for a dictionary."""

    nmse: float
    loss: float
    perplexity: float
    usage_perplexity: float
    utilisation: float
    revived: float


@dataclass(frozen=True)
class Reading:
    """Metrics that are being copied to the host."""

    _table: Tensor
    _copied: torch.cuda.Event | None

    def rows(self, first: int, last: int) -> list[StepMetrics]:
        """The metrics of the updates in [first, last), counted from 0; waits for the copy."""
        if self._copied is not None:
            self._copied.synchronize()
        table = self._table.tolist()
        return [StepMetrics(*table[update % len(table)]) for update in range(first, last)]


class Step:
    """An update: batch, forward pass, backward pass, optimizer and metrics.

    The number of the update, the learning rate and the metrics are tensors on the device. The host never waits for the
    device, and a CUDA graph can replay the update.

    Args:
        objective: an `Objective`, or a module that wraps one.
        kept: number of updates whose metrics are kept.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        autocast: Callable[[], AbstractContextManager[Any]],
        num_codes: int,
        kept: int,
        device: torch.device,
    ) -> None:
        self._objective = objective
        self._optimizer = optimizer
        self._batches = batches
        self._autocast = autocast
        self._clock = torch.zeros((), dtype=torch.int64, device=device)
        # A row is (metrics of `Objective`, number of assignments of each code); update u writes row u modulo `kept`.
        self._metrics = torch.zeros(kept, NUM_MEANS + num_codes, device=device)

    def set_clock(self, update: int) -> None:
        """Continue with this update, counted from 0."""
        self._clock.fill_(update)

    def read(self, ranks: Ranks) -> Reading:
        """Start to copy the kept metrics, of all ranks together, to the host."""
        # A clone, because an all-reduce sums in place.
        summed = ranks.sum(self._metrics.clone())
        # The losses of a rank are means over its part of the batch; all parts have the same size.
        means, counts = summed[:, :NUM_MEANS] / ranks.count, summed[:, NUM_MEANS:]
        table = torch.cat([means[:, :2], perplexity(counts)[:, None], means[:, 2:]], dim=1)
        host = torch.empty_like(table, device="cpu", pin_memory=table.is_cuda).copy_(table, non_blocking=True)
        event = torch.cuda.current_stream(table.device).record_event() if table.is_cuda else None
        return Reading(host, event)

    def __call__(self) -> None:
        with record_function("batch"):
            images = self._batches.take(self._clock)
        with self._autocast():
            loss, metrics, counts = self._objective(images)
        with record_function("backward"):
            self._optimizer.zero_grad()
            loss.backward()
        with record_function("optimizer"):
            self._optimizer.step()
        row = torch.cat([metrics, counts.float()])
        self._metrics.index_copy_(0, (self._clock % len(self._metrics)).view(1), row[None])
        self._clock.add_(1)

"""A training run in its folder."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from ..build import build_model
from . import checkpoint, graph
from .batches import Order, make_batches
from .config import Config
from .data import SetupError, load
from .device import autocast, pick_device
from .files import remove_partial, write_whole
from .lock import RunLock
from .metrics import Metrics
from .profiling import Profile
from .ranks import Ranks
from .step import Objective, Reading, Step, StepMetrics, make_schedule, rate_factor

# Updates between two readings of the metrics, which a device keeps until then.
METRICS_EVERY = {"cpu": 25, "cuda": 500}
# The files that training replaces.
_WRITTEN = ("config.json", "metrics.csv", "checkpoint.safetensors", "model.safetensors", "trace.json", "profile.txt")


class TrainingDiverged(Exception):
    """A loss or a weight is not finite."""


class Run:
    """A run: config.json, metrics.csv, checkpoint.safetensors, model.safetensors and TensorBoard events in a folder.

    Each rank has its own run in the same folder; only rank 0 writes.
    """

    def __init__(self, config: Config, folder: Path, ranks: Ranks | None = None) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.folder = folder
        self.ranks = ranks or Ranks()
        self.device = pick_device(config.device, self.ranks.local)
        with self.ranks.in_turns():
            self.images = load(config.data, Path(config.data_dir))
        self.variance = self.images.train_variance()
        if self.variance == 0:
            raise SetupError(f"expected training pixels that differ, got images of one value from {config.data}")
        order = Order(len(self.images.train), config.batch_size, config.seed, self.ranks)
        self.batches = make_batches(self.images.train, order, self.device, config.channels_last, config.loading)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = build_model(config, self.images.train.shape[1])
        self.model = model.to(self.device).to(memory_format=layout)
        is_cuda = self.device.type == "cuda"
        # The sizes of the convolutions are constant: cuDNN measures which algorithms are the fastest.
        torch.backends.cudnn.benchmark = is_cuda
        # A tensor on the device, which a CUDA graph reads at each replay.
        rate = torch.tensor(config.lr, device=self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=rate, fused=True, capturable=is_cuda)
        self.schedule = make_schedule(config, self.optimizer, 0)
        objective: nn.Module = Objective(self.model, self.variance)
        if config.compile:
            objective.compile()
        objective = self.ranks.wrap(objective, self.device)
        in_precision = partial(autocast, config.precision, self.device)
        kept = METRICS_EVERY[self.device.type]
        self._step = Step(
            objective, self.optimizer, self.batches, in_precision, config.num_embeddings, kept, self.device
        )
        self._launch = self._launcher()
        self.metrics = Metrics(folder)
        self.update = 0
        self.seconds = 0.0
        # The metrics of the updates from this one on are only on the device.
        self._read = 0
        # Metrics that are being copied to the host, with the first update and the one after the last.
        self._pending: list[tuple[Reading, int, int]] = []
        self._lock: RunLock | None = None

    def _launcher(self) -> Callable[[], None]:
        """The step, as a CUDA graph if possible and enabled."""
        if self.device.type == "cpu" or not self.config.cuda_graph:
            return self._step
        if self.ranks.count == 1:
            return graph.GraphedStep(self._step, self.device)
        if self.ranks.writes:
            graph.print_disabled("DistributedDataParallel all-reduces the gradients of several ranks from the host")
        return self._step

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def start(self) -> None:
        """Create the folder, and hold its lock until `close`.

        Raises:
            SetupError: the folder exists or cannot be created.
            OSError: a file in it cannot be written.
        """
        if self.ranks.writes:
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError as error:
                raise folder_exists(self.folder) from error
            except OSError as error:
                raise SetupError(
                    f"the folder {self.folder} cannot be created ({error}); choose another --out"
                ) from error
            self._lock = RunLock(self.folder)
            write_whole(self.folder / "config.json", self.config.to_json())
            self.metrics.begin()

    def resume(self) -> None:
        """Load the checkpoint, or start from the beginning if there is none; hold the lock until `close`.

        Raises:
            ValueError: the checkpoint or metrics.csv is broken, the checkpoint has more updates than `updates` or is
                not the one that rank 0 sees, or another process holds the lock.
            OSError: a file cannot be read or written.
        """
        config = self.config
        if self.ranks.writes:
            self._lock = RunLock(self.folder)
            remove_partial(*(self.folder / name for name in _WRITTEN))
            checkpoint.remove_partial(self.folder)
        if os.path.lexists(self.checkpoint_path):
            progress = checkpoint.load(self.checkpoint_path, self.model, self.optimizer)
            self.update, self.seconds = progress["update"], progress["seconds"]
        if self.update > config.updates:
            raise ValueError(
                f"expected updates to be at least {self.update}, which {self.folder} has done already, got"
                f" {config.updates}; give a larger --updates"
            )
        of_first = self.ranks.from_first(self.update)
        if self.update != of_first:
            raise ValueError(
                f"expected {self.folder} to be the same folder on all ranks, got a checkpoint of {self.update} updates"
                f" on rank {self.ranks.rank} and of {of_first} on rank 0"
            )
        self._step.set_clock(self.update)
        self.schedule = make_schedule(config, self.optimizer, self.update)
        self._read = self.update
        if self.ranks.writes:
            self.metrics.cut(self.update)
            write_whole(self.folder / "config.json", config.to_json())

    def close(self) -> None:
        """Release the lock of the folder."""
        if self._lock:
            self._lock.release()

    def train(self) -> bool:
        """Train until the end (True) or an interrupt (False), and save.

        Raises:
            TrainingDiverged: a loss or a weight is not finite; the last good checkpoint is kept.
            RankLostError: another rank is lost; the last checkpoint is kept.
            OSError: a file cannot be written; the last checkpoint is kept.
        """
        from tqdm import tqdm

        config, writes = self.config, self.ranks.writes
        self.model.train()
        refresh = 0.5 if sys.stderr.isatty() else 30  # seconds
        bar = tqdm(total=config.updates, initial=self.update, unit="update", mininterval=refresh, disable=not writes)
        alone = self.ranks.count == 1
        profile = Profile(self.folder, self.device) if config.profile and writes else None
        if writes:
            self.metrics.open_board(self.update)
        with closing(self.metrics), bar, _interrupts(second_ends=alone) as interrupted, self.ranks.watched():
            begin = time.perf_counter() - self.seconds
            stops = False
            while self.update < config.updates and not stops:
                self.step()
                if profile:
                    profile.step()
                bar.update()
                saves = self.update % config.checkpoint_every == 0
                reads = saves or self.update - self._read == METRICS_EVERY[self.device.type]
                if reads:
                    # On a GPU these metrics are written after the next updates are launched.
                    bar.set_postfix(self._read_metrics(waits=saves or self.device.type == "cpu"))
                    self.seconds = time.perf_counter() - begin
                if saves:
                    self._save()
                # Several ranks agree on the update at which they stop.
                if alone or reads:
                    stops = self.ranks.any(bool(interrupted), self.device)
            if profile:
                profile.close()
            self._read_metrics(waits=True)
            self.seconds = time.perf_counter() - begin
            self._save()
        return self.update >= config.updates

    def step(self) -> None:
        """Launch one update, without waiting for the device."""
        self.batches.prepare(self.update)
        self._launch()
        self.schedule.step()
        self.update += 1

    def _read_metrics(self, waits: bool) -> dict[str, str]:
        """Start to read the metrics of the updates since the last reading, and write those of earlier readings.

        With `waits`, the new ones are written as well. Returns the newest metrics for the progress bar.
        """
        if self._read < self.update:
            self._pending.append((self._step.read(self.ranks), self._read, self.update))
            self._read = self.update
        newest = {}
        while len(self._pending) > (0 if waits else 1):
            reading, first, last = self._pending.pop(0)
            newest = self._write_metrics(reading.rows(first, last), first)
        return newest

    def _write_metrics(self, rows: list[StepMetrics], first: int) -> dict[str, str]:
        """Write the metrics of the updates from `first` on; returns the newest for the progress bar."""
        bad = next((i for i, row in enumerate(rows) if not math.isfinite(row.loss)), None)
        if self.ranks.writes:
            config, numbered = self.config, enumerate(rows[:bad], start=first)
            self.metrics.add((update + 1, *row, config.lr * rate_factor(config, update)) for update, row in numbered)
        if bad is not None:
            raise TrainingDiverged(f"the loss of update {first + bad + 1} is {rows[bad].loss}; {self._advice()}")
        newest = rows[-1]
        shown = {"nmse": f"{newest.nmse:.4f}", "perplexity": f"{newest.perplexity:.0f}"}
        if not math.isnan(newest.utilisation):
            shown |= {"utilisation": f"{newest.utilisation:.0%}", "revived": f"{newest.revived:.0f}"}
        return shown

    def _save(self) -> None:
        # The last loss was computed before the last update: it does not show whether that update broke the weights.
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise TrainingDiverged(f"the weights after update {self.update} are not finite; {self._advice()}")
        if self.ranks.writes:
            progress = {"update": self.update, "seconds": self.seconds}
            checkpoint.save(self.checkpoint_path, self.model, self.optimizer, progress)

    def _advice(self) -> str:
        kept = self.checkpoint_path if self.checkpoint_path.exists() else "none"
        return f"start a new run with a lower --lr. Last good checkpoint: {kept}"


def folder_exists(folder: Path) -> SetupError:
    return SetupError(f"{folder} exists already; choose another --out, or resume it with --resume {folder}")


@contextmanager
def _interrupts(second_ends: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the run saves before it ends; with `second_ends`, a second one ends it."""
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for each in (signal.SIGINT, signal.SIGTERM) if second_ends else ():
            signal.signal(each, previous[each])

    previous = {each: signal.signal(each, catch) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)

"""Train a model and report on it: `python -m models.train --help`."""

from __future__ import annotations

import csv
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from . import checkpoint, report
from .autoencoder import perplexity
from .build import autocast, build_model, pick_device
from .config import Config, parse
from .data import Batches, DataError, load

_COLUMNS = ("update", "nmse", "loss", "perplexity", "lr")
# Steps between looks at the losses: each look waits for the device.
_LOOK_EVERY = 25


class TrainingDiverged(Exception):
    """The loss is no longer a number."""


def learning_rate(config: Config, update: int) -> float:
    """Of an update, counted from 0."""
    if config.schedule == "constant":
        return config.lr
    warmup = min(1.0, (update + 1) / max(1, config.warmup))
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * update / config.updates))


class Run:
    """A run in its folder: config.json, metrics.csv, checkpoint.safetensors, model.safetensors, TensorBoard events."""

    def __init__(self, config: Config, folder: Path) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.folder = folder
        self.device = pick_device(config.device)
        self.images = load(config.data, Path(config.data_dir))
        self.variance = self.images.train_variance()
        if self.variance == 0:
            raise DataError(f"all training pixels of {config.data} are equal: there is nothing to learn")
        self.batches = Batches(
            self.images.train, config.batch_size, config.seed, self.device, channels_last=config.channels_last
        )
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = build_model(config, self.images.train.shape[1])
        self.model = model.to(self.device).to(memory_format=layout)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        self.update = 0
        self.seconds = 0.0
        self._pending: list[Tensor] = []

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def start(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(self.config.to_json())
        with self._metrics().open("w", newline="") as file:
            csv.writer(file).writerow(_COLUMNS)

    def resume(self) -> None:
        if self.checkpoint_path.exists():
            progress = checkpoint.load(self.checkpoint_path, self.model, self.optimizer)
            self.update, self.seconds = progress["update"], progress["seconds"]
        # The file is replaced last of all, so rows after the checkpoint are of updates that are done again.
        with self._metrics().open(newline="") as file:
            header, *rows = list(csv.reader(file))
        partial = self._metrics().with_suffix(".partial")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows[: self.update]])
        os.replace(partial, self._metrics())
        (self.folder / "config.json").write_text(self.config.to_json())

    def train(self) -> bool:
        """Train to the end, or until interrupted (False); either way all is saved.

        Raises:
            TrainingDiverged: a loss is not a number; the last good checkpoint is kept.
        """
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        config = self.config
        self.model.train()
        refresh = 0.5 if sys.stderr.isatty() else 30  # seconds
        with (
            SummaryWriter(str(self.folder), purge_step=self.update) as board,
            tqdm(total=config.updates, initial=self.update, unit="update", mininterval=refresh) as bar,
            _interrupts() as interrupted,
        ):
            begin = time.perf_counter() - self.seconds
            while self.update < config.updates and not interrupted:
                self._pending.append(self._step())
                self.update += 1
                bar.update()
                saves = self.update % config.checkpoint_every == 0
                if saves or len(self._pending) == _LOOK_EVERY:
                    bar.set_postfix(self._look(board))
                    self.seconds = time.perf_counter() - begin
                if saves:
                    self._save()
            self._look(board)
            self.seconds = time.perf_counter() - begin
            self._save()
        return self.update >= config.updates

    def _step(self) -> Tensor:
        """One update; returns (nmse, loss, perplexity) on the device, without waiting for it."""
        images = self.batches[self.update]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.update)
        with autocast(self.config, self.device):
            coding = self.model.code(self.model.encode(images))
            reconstruction = self.model.decode(coding.latents)
        nmse = mse_loss(reconstruction.float(), images) / self.variance
        loss = nmse + coding.loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        in_use = perplexity(coding.use(self.config.num_embeddings))
        return torch.stack([nmse.detach(), loss.detach(), in_use])

    def _look(self, board: Any) -> dict[str, str]:
        """Write the metrics of the updates since the last look; give the newest for the progress bar."""
        if not self._pending:
            return {}
        rows = torch.stack(self._pending).tolist()
        self._pending.clear()
        first = self.update - len(rows)
        bad = next((i for i, row in enumerate(rows) if not math.isfinite(row[1])), None)
        good = rows if bad is None else rows[:bad]
        with self._metrics().open("a", newline="") as file:
            writer = csv.writer(file)
            for update, row in enumerate(good, start=first):
                rate = learning_rate(self.config, update)
                writer.writerow([update + 1, *(f"{value:.6g}" for value in (*row, rate))])
                for name, value in zip(_COLUMNS[1:], (*row, rate), strict=True):
                    board.add_scalar(name, value, update + 1)
        if bad is not None:
            kept = self.checkpoint_path if self.checkpoint_path.exists() else "none yet"
            raise TrainingDiverged(
                f"the loss of update {first + bad + 1} is {rows[bad][1]}; try a lower --lr. Last checkpoint: {kept}"
            )
        return {"nmse": f"{rows[-1][0]:.4f}", "perplexity": f"{rows[-1][2]:.0f}"}

    def _save(self) -> None:
        progress = {"update": self.update, "seconds": self.seconds}
        checkpoint.save(self.checkpoint_path, self.model, self.optimizer, progress)

    def _metrics(self) -> Path:
        return self.folder / "metrics.csv"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one is let through."""
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, previous[each])

    previous = {each: signal.signal(each, catch) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def main(arguments: list[str] | None = None) -> int:
    command = parse(arguments)
    config = command.config
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(config.out or f"runs/{config.model}-{config.data.split(':')[0]}-{stamp}")
    try:
        if command.resume is None and folder.exists():
            raise DataError(f"{folder} exists already; choose another --out, or go on with --resume {folder}")
        run = Run(config, folder)
    except (DataError, ValueError) as error:
        return _fail(error)
    run.resume() if command.resume else run.start()
    try:
        finished = run.train()
    except TrainingDiverged as error:
        return _fail(error)
    if not finished:
        print(f"interrupted after {run.update} updates; go on with: python -m models.train --resume {folder}")
        return 130
    checkpoint.save_weights(folder / "model.safetensors", run.model)
    report.write(folder, run.images)
    return 0


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

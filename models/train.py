"""Train a model and report on it: `python -m models.train --help`."""

from __future__ import annotations

import csv
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
        """Make the folder.

        Raises:
            OSError: it cannot be made.
        """
        self.folder.mkdir(parents=True)
        _write(self.folder / "config.json", self.config.to_json())
        self._write_metrics([])

    def resume(self) -> None:
        """Take up the checkpoint, or begin anew where there is none yet.

        Raises:
            ValueError: the checkpoint is broken, or of more updates than are asked for.
        """
        if self.checkpoint_path.exists():
            progress = checkpoint.load(self.checkpoint_path, self.model, self.optimizer)
            self.update, self.seconds = progress["update"], progress["seconds"]
        if self.update > self.config.updates:
            raise ValueError(f"updates is {self.config.updates}; {self.folder} has done {self.update} already")
        # Rows after the checkpoint, of which the last may be cut, are of updates that are done again.
        rows: list[list[str]] = []
        if self._metrics().exists():
            with self._metrics().open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))[1 : self.update + 1]
        self._write_metrics(rows)
        _write(self.folder / "config.json", self.config.to_json())

    def train(self) -> bool:
        """Train to the end, or until interrupted (False); either way all is saved.

        Raises:
            TrainingDiverged: a loss is not a number; the last good checkpoint is kept.
        """
        from tqdm import tqdm

        config = self.config
        self.model.train()
        refresh = 0.5 if sys.stderr.isatty() else 30  # seconds
        with (
            _board(self.folder, self.update) as board,
            tqdm(total=config.updates, initial=self.update, unit="update", mininterval=refresh) as bar,
            _interrupts() as interrupted,
        ):
            begin = time.perf_counter() - self.seconds
            while self.update < config.updates and not interrupted:
                self._pending.append(self.step())
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

    def step(self) -> Tensor:
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
        self.update += 1
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
        with self._metrics().open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            for update, row in enumerate(good, start=first):
                rate = learning_rate(self.config, update)
                writer.writerow([update + 1, *(f"{value:.6g}" for value in (*row, rate))])
                for name, value in zip(_COLUMNS[1:], (*row, rate), strict=True) if board else ():
                    board.add_scalar(name, value, update + 1)
        if bad is not None:
            raise TrainingDiverged(f"the loss of update {first + bad + 1} is {rows[bad][1]}; {self._advice()}")
        return {"nmse": f"{rows[-1][0]:.4f}", "perplexity": f"{rows[-1][2]:.0f}"}

    def _save(self) -> None:
        # The losses seen so far are of the weights before the last update.
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise TrainingDiverged(f"update {self.update} made weights that are not finite; {self._advice()}")
        progress = {"update": self.update, "seconds": self.seconds}
        checkpoint.save(self.checkpoint_path, self.model, self.optimizer, progress)

    def _advice(self) -> str:
        kept = self.checkpoint_path if self.checkpoint_path.exists() else "none"
        return f"start a new run with a lower --lr. Last good checkpoint: {kept}"

    def _metrics(self) -> Path:
        return self.folder / "metrics.csv"

    def _write_metrics(self, rows: list[list[str]]) -> None:
        text = "".join(",".join(row) + "\n" for row in [_COLUMNS, *rows])
        _write(self._metrics(), text)


def _board(folder: Path, update: int) -> AbstractContextManager[Any]:
    """A writer of TensorBoard events, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: no events are written", file=sys.stderr)
        return nullcontext()
    return SummaryWriter(str(folder), purge_step=update)


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


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
        return _run(config, folder, resumes=command.resume is not None)
    except (DataError, TrainingDiverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; what was saved is in {folder}", file=sys.stderr)
        return 130


def _run(config: Config, folder: Path, resumes: bool) -> int:
    if not resumes and folder.exists():
        raise DataError(f"{folder} exists already; choose another --out, or go on with --resume {folder}")
    try:
        run = Run(config, folder)
        run.resume() if resumes else run.start()
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
    if not run.train():
        again = shlex.join(["python", "-m", "models.train", "--resume", str(folder)])
        print(f"interrupted after {run.update} updates; go on with: {again}")
        return 130
    checkpoint.save_weights(folder / "model.safetensors", run.model)
    report.write(folder, run.device, run.images)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a model and report on it: `python -m models.train --help`; several processes: `torchrun -m models.train`."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from . import checkpoint, graph, packages, report
from .batches import Order, make_batches
from .build import autocast, build_model, pick_device
from .config import Config, parse
from .data import DataError, load
from .files import remove_partial, write_whole
from .lock import RunLock
from .memory import check_memory
from .metrics import Metrics
from .profiling import Profile
from .ranks import RankLostError, Ranks, end_process, join, leave, local_rank
from .step import Objective, Reading, Step, learning_rate

# The files that training writes and replaces.
_WRITTEN = ("config.json", "metrics.csv", "checkpoint.safetensors", "model.safetensors", "trace.json", "profile.txt")
# Updates between looks at the losses, which hold up the device.
_LOOK_EVERY = {"cpu": 25, "cuda": 500}


class TrainingDiverged(Exception):
    """The loss is no longer a number."""


class RunBroken(Exception):
    """A file cannot be written, or another rank is gone; the message says how to go on."""


class Run:
    """A run in its folder: config.json, metrics.csv, checkpoint.safetensors, model.safetensors, TensorBoard events.

    Of several ranks each has a run of its own in the same folder, and the first alone writes.
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
            raise DataError(f"all training pixels of {config.data} are equal: there is nothing to learn")
        order = Order(len(self.images.train), config.batch_size, config.seed, self.ranks)
        self.batches = make_batches(self.images.train, order, self.device, config.channels_last, config.loading)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = build_model(config, self.images.train.shape[1])
        self.model = model.to(self.device).to(memory_format=layout)
        is_cuda = self.device.type == "cuda"
        # The convolutions never change their sizes: the first updates find the fastest algorithms.
        torch.backends.cudnn.benchmark = is_cuda
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True, capturable=is_cuda)
        objective: nn.Module = Objective(self.model, self.variance)
        if config.compile:
            objective.compile()
        objective = self.ranks.wrap(objective, self.device)
        in_precision = partial(autocast, config, self.device)
        self._look_every = _LOOK_EVERY[self.device.type]
        self._step = Step(config, objective, self.optimizer, self.batches, in_precision, self.device, self._look_every)
        self._launch = self._launcher()
        self.metrics = Metrics(folder)
        self.update = 0
        self.seconds = 0.0
        # The metrics of later updates are on the device alone.
        self._looked = 0
        # Metrics that have been asked for, with the first update and the one after the last.
        self._asked: list[tuple[Reading, int, int]] = []
        self._lock: RunLock | None = None

    def _launcher(self) -> Callable[[], None]:
        """The step, as a CUDA graph where that can be and is asked for."""
        if self.device.type == "cpu" or not self.config.cuda_graph:
            return self._step
        if self.ranks.count == 1:
            return graph.Repeated(self._step, self.device)
        if self.ranks.writes:
            reason = "DistributedDataParallel joins the gradients of several ranks from the host"
            print(f"no CUDA graph, updates run launch by launch: {reason}", file=sys.stderr)
        return self._step

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def start(self) -> None:
        """Make the folder, and hold its lock until `close`.

        Raises:
            DataError: the folder exists or cannot be made.
            OSError: a file in it cannot be written.
        """
        if self.ranks.writes:
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError as error:
                raise _exists(self.folder) from error
            except OSError as error:
                raise DataError(f"the folder {self.folder} cannot be made ({error}); choose another --out") from error
            self._lock = RunLock(self.folder)
            write_whole(self.folder / "config.json", self.config.to_json())
            self.metrics.begin()

    def resume(self) -> None:
        """Take up the checkpoint, or begin anew where there is none yet; hold the lock of the folder until `close`.

        Raises:
            ValueError: the checkpoint or metrics.csv is broken, the checkpoint is of more updates than are asked for or
                not the one that rank 0 sees, or another process holds the lock.
            OSError: a file cannot be read or written.
        """
        if self.ranks.writes:
            self._lock = RunLock(self.folder)
            remove_partial(*(self.folder / name for name in _WRITTEN))
            checkpoint.remove_partial(self.folder)
        if os.path.lexists(self.checkpoint_path):
            progress = checkpoint.load(self.checkpoint_path, self.model, self.optimizer)
            self.update, self.seconds = progress["update"], progress["seconds"]
        if self.update > self.config.updates:
            done = f"{self.folder} has done {self.update} already"
            raise ValueError(f"updates is {self.config.updates}; {done}: give a larger --updates")
        of_first = self.ranks.from_first(self.update)
        if self.update != of_first:
            raise ValueError(
                f"{self.folder} holds a checkpoint of {self.update} updates for rank {self.ranks.rank}"
                f" and of {of_first} for rank 0; all ranks need to see the same folder"
            )
        self._step.set_clock(self.update)
        self._looked = self.update
        if self.ranks.writes:
            self.metrics.cut(self.update)
            write_whole(self.folder / "config.json", self.config.to_json())

    def close(self) -> None:
        """Let other processes train in the folder."""
        if self._lock:
            self._lock.release()

    def train(self) -> bool:
        """Train to the end, or until interrupted (False); either way all is saved.

        Raises:
            TrainingDiverged: a loss is not a number; the last good checkpoint is kept.
            RankLostError: another rank is gone; the last checkpoint is kept.
            OSError: a file cannot be written; the last checkpoint is kept.
        """
        from tqdm import tqdm

        config = self.config
        self.model.train()
        refresh = 0.5 if sys.stderr.isatty() else 30  # seconds
        bar = tqdm(
            total=config.updates,
            initial=self.update,
            unit="update",
            mininterval=refresh,
            disable=not self.ranks.writes,
        )
        alone = self.ranks.count == 1
        profile = Profile(self.folder, self.device) if config.profile and self.ranks.writes else None
        metrics = self.metrics.open_board(self.update) if self.ranks.writes else self.metrics
        with metrics, bar, _interrupts(lets_second_through=alone) as interrupted, self.ranks.watched():
            begin = time.perf_counter() - self.seconds
            stops = False
            while self.update < config.updates and not stops:
                self.step()
                if profile:
                    profile.step()
                bar.update()
                saves = self.update % config.checkpoint_every == 0
                looks = saves or self.update - self._looked == self._look_every
                if looks:
                    # On a GPU the metrics of one look are written while the updates of the next are on their way.
                    bar.set_postfix(self._look(waits=saves or self.device.type == "cpu"))
                    self.seconds = time.perf_counter() - begin
                if saves:
                    self._save()
                # Several ranks agree on the update at which they stop.
                if alone or looks:
                    stops = self.ranks.any(bool(interrupted), self.device)
            if profile:
                profile.close()
            self._look(waits=True)
            self.seconds = time.perf_counter() - begin
            self._save()
        return self.update >= config.updates

    def step(self) -> None:
        """One update, without waiting for the device."""
        self.batches.prepare(self.update)
        self._launch()
        self.update += 1

    def _look(self, waits: bool) -> dict[str, str]:
        """Ask for the metrics of the updates since the last look; write those that were asked for before.

        With `waits` those asked for now as well. Gives the newest for the progress bar.
        """
        if self._looked < self.update:
            self._asked.append((self._step.read(self.ranks), self._looked, self.update))
            self._looked = self.update
        newest = {}
        while len(self._asked) > (0 if waits else 1):
            reading, first, last = self._asked.pop(0)
            newest = self._tell(reading.rows(first, last), first)
        return newest

    def _tell(self, rows: list[tuple[float, float, float]], first: int) -> dict[str, str]:
        """Write the metrics (nmse, loss, perplexity) of the updates from the `first` on."""
        bad = next((i for i, (_, loss, _) in enumerate(rows) if not math.isfinite(loss)), None)
        good = rows if bad is None else rows[:bad]
        if self.ranks.writes:
            numbered = enumerate(good, start=first)
            self.metrics.add((update + 1, *row, learning_rate(self.config, update)) for update, row in numbered)
        if bad is not None:
            raise TrainingDiverged(f"the loss of update {first + bad + 1} is {rows[bad][1]}; {self._advice()}")
        nmse, _, in_use = rows[-1]
        return {"nmse": f"{nmse:.4f}", "perplexity": f"{in_use:.0f}"}

    def _save(self) -> None:
        # The losses seen so far are of the weights before the last update.
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise TrainingDiverged(f"update {self.update} made weights that are not finite; {self._advice()}")
        if self.ranks.writes:
            progress = {"update": self.update, "seconds": self.seconds}
            checkpoint.save(self.checkpoint_path, self.model, self.optimizer, progress)

    def _advice(self) -> str:
        kept = self.checkpoint_path if self.checkpoint_path.exists() else "none"
        return f"start a new run with a lower --lr. Last good checkpoint: {kept}"


@contextmanager
def _interrupts(lets_second_through: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one may be let through."""
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for each in (signal.SIGINT, signal.SIGTERM) if lets_second_through else ():
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
    except (DataError, TrainingDiverged, RunBroken) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; what was saved is in {folder}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        print(f"error: out of memory ({reason}); lower --batch-size, --hiddens or --num-embeddings", file=sys.stderr)
        return 1


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch, whose allocator for the CPU has no error type of its own, or Python could not get memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _run(config: Config, folder: Path, resumes: bool) -> int:
    with ExitStack() as stack:
        run = _begun(config, folder, resumes, stack)
        folder, ranks = run.folder, run.ranks
        start = ["python"] if ranks.count == 1 else ["torchrun", "..."]
        again = shlex.join([*start, "-m", "models.train", "--resume", str(folder)])
        if ranks.count > 1 and ranks.writes:
            print(f"should a rank be lost, go on with: {again}")
        try:
            finished = run.train()
            leave(ranks)
            if finished and ranks.writes:
                checkpoint.save_weights(folder / "model.safetensors", run.model)
                report.write(folder, run.device, run.images)
        except (OSError, RankLostError) as error:
            kept = f"go on with: {again}" if run.checkpoint_path.exists() else "nothing was saved before"
            raise RunBroken(f"{error}; {kept}") from error
        if not finished and ranks.writes:
            print(f"interrupted after {run.update} updates; go on with: {again}")
        return 0 if finished else 130


def _begun(config: Config, folder: Path, resumes: bool, stack: ExitStack) -> Run:
    """A run that is ready to train, after all checks that are possible before; it is closed with the stack."""
    try:
        packages.require(config.data, trains=True)
        device = pick_device(config.device, local_rank())
        check_memory(config, device, _LOOK_EVERY[device.type])
        ranks = join(device, config.rank_timeout)
        with ranks.watched():
            # Of the first rank, whose clock has named it.
            folder = ranks.from_first(_checked(folder, resumes) if ranks.writes else folder)
            run = stack.enter_context(closing(Run(config, folder, ranks)))
            run.resume() if resumes else run.start()
    except (ValueError, OSError, RankLostError) as error:
        raise DataError(str(error)) from error
    if ranks.writes:
        packages.note_missing()
    return run


def _checked(folder: Path, resumes: bool) -> Path:
    """The folder, which a new run needs to make and a resumed one to write into."""
    if not resumes and os.path.lexists(folder):
        raise _exists(folder)
    above = folder if resumes else next(each for each in folder.absolute().parents if os.path.lexists(each))
    if not above.is_dir():
        raise DataError(f"the folder {folder} cannot be made: {above} is not a folder; choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        remedy = "copy the run to another folder and resume it there" if resumes else "choose another --out"
        raise DataError(f"the folder {above} is not writable; {remedy}")
    return folder


def _exists(folder: Path) -> DataError:
    return DataError(f"{folder} exists already; choose another --out, or go on with --resume {folder}")


if __name__ == "__main__":
    end_process(main())

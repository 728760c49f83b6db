"""Train a model and write a report: `python -m models.train --help`; several processes: `torchrun -m models.train`."""

from __future__ import annotations

import os
import shlex
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from .report import report
from .training import checkpoint, packages
from .training.config import Config, parse
from .training.data import SetupError
from .training.device import pick_device
from .training.memory import check_memory
from .training.ranks import RankLostError, end_process, join, leave, local_rank
from .training.run import METRICS_EVERY, Run, TrainingDiverged, folder_exists


class RunBroken(Exception):
    """A file cannot be written, or another rank is lost; the message says how to resume."""


def main(arguments: list[str] | None = None) -> int:
    command = parse(arguments)
    config = command.config
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(config.out or f"runs/{config.model}-{config.data.split(':')[0]}-{stamp}")
    try:
        return _train_and_report(config, folder, resumes=command.resume is not None)
    except (SetupError, TrainingDiverged, RunBroken) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the last checkpoint is in {folder}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        print(f"error: out of memory ({reason}); lower --batch-size, --hiddens or --num-embeddings", file=sys.stderr)
        return 1


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch is out of memory; torch's allocator for the CPU has no error type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _train_and_report(config: Config, folder: Path, resumes: bool) -> int:
    with ExitStack() as stack:
        run = _ready_run(config, folder, resumes, stack)
        folder, ranks = run.folder, run.ranks
        start = ["python"] if ranks.count == 1 else ["torchrun", "..."]
        command = shlex.join([*start, "-m", "models.train", "--resume", str(folder)])
        if ranks.count > 1 and ranks.writes:
            print(f"if a rank is lost, resume with: {command}")
        try:
            finished = run.train()
            leave(ranks)
            if finished and ranks.writes:
                checkpoint.save_weights(folder / "model.safetensors", run.model)
                report.write(folder, run.device, run.images)
        except (OSError, RankLostError) as error:
            remedy = f"resume with: {command}" if run.checkpoint_path.exists() else "there is no checkpoint yet"
            raise RunBroken(f"{error}; {remedy}") from error
        if not finished and ranks.writes:
            print(f"interrupted after {run.update} updates; resume with: {command}")
        return 0 if finished else 130


def _ready_run(config: Config, folder: Path, resumes: bool, stack: ExitStack) -> Run:
    """A run after all checks, ready to train; `stack` closes it."""
    try:
        packages.require(config.data, trains=True)
        device = pick_device(config.device, local_rank())
        check_memory(config, device, METRICS_EVERY[device.type])
        ranks = join(device, config.rank_timeout)
        with ranks.watched():
            # The folder of rank 0: without --out, its name holds the time.
            folder = ranks.from_first(_checked(folder, resumes) if ranks.writes else folder)
            run = stack.enter_context(closing(Run(config, folder, ranks)))
            run.resume() if resumes else run.start()
    except (ValueError, OSError, RankLostError) as error:
        raise SetupError(str(error)) from error
    if ranks.writes:
        packages.note_missing()
    return run


def _checked(folder: Path, resumes: bool) -> Path:
    """The folder, after a check that a new run can create it and a resumed run can write into it."""
    if not resumes and os.path.lexists(folder):
        raise folder_exists(folder)
    above = folder if resumes else next(each for each in folder.absolute().parents if os.path.lexists(each))
    if not above.is_dir():
        raise SetupError(f"the folder {folder} cannot be created: {above} is not a folder; choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        remedy = "copy the run to another folder and resume it there" if resumes else "choose another --out"
        raise SetupError(f"the folder {above} is not writable; {remedy}")
    return folder


if __name__ == "__main__":
    end_process(main())

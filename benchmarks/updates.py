"""Updates a second of the notebook's training: runs of ours beside its own loop, projected to all its updates."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.training.config import Config, parse
from models.training.run import Run

from . import ceilings, training
from .results import Row, completed, writing

MODELS = ("vqvae-ema", "dlvae")
COLUMNS = (
    *("model", "contender", "precision", "updates", "rounds", "updates_per_second", "ms", "projected_seconds"),
    *("ratio", "gflop", "limit_percent", "nmse", "device", "threads", "versions", "commit"),
)
# The notebook's loop is not worth more of them: its updates are alike, and slow.
_MOST_OF_NOTEBOOK = 200
# Errors of single batches scatter.
_ERRORS = 10


@dataclass(frozen=True)
class _Timed:
    seconds: float  # for an update
    nmse: float  # of the last updates


def measure(
    device: torch.device, path: Path, updates: int, rounds: int, batch_size: int = 256, models: tuple[str, ...] = MODELS
) -> list[Row]:
    """Time `updates` updates of each model, `rounds` times in turns; rows of COLUMNS, written to a CSV file.

    Ours is the whole of `models.train`, with its metrics, its checkpoints and what it does at its start.
    """
    names = ["float32"] + ["bfloat16"] * ceilings.has_products(device, torch.bfloat16)
    limits = {name: _limit(device, getattr(torch, name)) for name in names}
    table = []
    with writing(path, COLUMNS) as add:
        for model in models:
            rows = completed(_rows(model, device, updates, rounds, batch_size, limits), device)
            add(rows)
            table += rows
            print(*map(line, rows), sep="\n")
    return table


def line(row: Row) -> str:
    """A row for the eye."""
    return (
        f"{row['model']:<10} {row['contender']:<14} {row['precision']:<9} {row['updates_per_second']:>9} updates/s,"
        f" {row['ms']:>8} ms each, {row['projected_seconds']:>7} s for all; ratio {row['ratio']},"
        f" {row['limit_percent']} % of the limit, NMSE {row['nmse']}"
    )


def _rows(
    model: str, device: torch.device, updates: int, rounds: int, batch_size: int, limits: dict[str, float]
) -> list[Row]:
    def config(precision: str, count: int) -> Config:
        words = ["--preset", "notebook", "--model", model, "--data", training.images(), "--device", str(device)]
        words += ["--precision", precision, "--channels-last", "--batch-size", str(batch_size)]
        return parse([*words, "--updates", str(count), "--checkpoint-every", "2000"]).config

    of_notebook = min(updates, _MOST_OF_NOTEBOOK)
    contenders: dict[tuple[str, str], tuple[int, Callable[[int], _Timed]]] = {
        ("dlvae_kernels", "float32"): (updates, lambda count: _ours(config("float32", count))),
        ("notebook", "float32"): (of_notebook, lambda count: _notebook(config("float32", count))),
    }
    if "bfloat16" in limits:
        contenders["dlvae_kernels", "bfloat16"] = updates, lambda count: _ours(config("bfloat16", count))
    for _, run in contenders.values():
        # What is compiled and chosen once is not of an update.
        run(training.BEFORE_TIMING)
    timed: dict[tuple[str, str], list[_Timed]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key, (count, run) in contenders.items():
            timed[key].append(run(count))
    flops = _flops(config("float32", 1))
    first = statistics.median(each.seconds for each in timed["dlvae_kernels", "float32"])
    rows = []
    for (contender, precision), each in timed.items():
        seconds = statistics.median(one.seconds for one in each)
        rows.append(
            {
                "model": model,
                "contender": contender,
                "precision": precision,
                "updates": contenders[contender, precision][0],
                "rounds": rounds,
                "updates_per_second": f"{1 / seconds:.4g}",
                "ms": f"{seconds * 1e3:.4g}",
                "projected_seconds": f"{seconds * _all_updates():.5g}",
                "ratio": f"{seconds / first:.3f}",
                "gflop": f"{flops / 1e9:.1f}",
                "limit_percent": f"{100 * flops / seconds / limits[precision]:.1f}",
                "nmse": f"{statistics.mean(one.nmse for one in each):.4g}",
            }
        )
    return rows


def _limit(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of torch at best, whose products may go through another library than its convolutions."""
    with torch.no_grad():
        return max(ceilings.product_rate(device, dtype), ceilings.convolution_rate(device, dtype))


def _all_updates() -> int:
    return parse(["--preset", "notebook"]).config.updates


def _ours(config: Config) -> _Timed:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder) / "run")
        run.start()
        run.train()
        errors = [float(row.split(",")[1]) for row in (run.folder / "metrics.csv").read_text().splitlines()[1:]]
    return _Timed(run.seconds / config.updates, statistics.mean(errors[-_ERRORS:]))


def _notebook(config: Config) -> _Timed:
    update, errors = training.notebook_loop(Run(config, Path("unwritten")))
    begin = time.perf_counter()
    for _ in range(config.updates):
        # It waits for the error of each, so that the time is that of the device.
        update()
    seconds = time.perf_counter() - begin
    return _Timed(seconds / config.updates, statistics.mean(errors[-_ERRORS:]))


def _flops(config: Config) -> float:
    """Of an update in the notebook's formulas, forward and backward; products alone count."""
    run = Run(config, Path("unwritten"))
    network = training.NotebookModel(run.model, config)
    with FlopCounterMode(display=False) as counter:
        loss, reconstruction, _ = network(run.batches[0])
        (loss + reconstruction.square().mean()).backward()
    return counter.get_total_flops()

"""The CSV files of results: a row for each operation, size, implementation and pass, with versions and commit."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results"
# ms: time; ratio: time divided by the time of this library in the same round; both as median, 20th and 80th percentile.
# limit_percent: lower bound of the time, as a percentage of the time. peak_mb: MB beyond the inputs, of forward, or of
# forward and backward together. differing: fraction of indices that differ from float64.
COLUMNS = (
    *("op", "pass", "workload", "size", "implementation", "backend", "precision"),
    *("ms", "ms_p20", "ms_p80", "ratio", "ratio_p20", "ratio_p80", "limit_percent", "peak_mb"),
    *("differing", "error", "status", "device", "threads", "versions", "commit"),
)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return next(models, f":{platform.processor()}").partition(":")[2].strip()


@lru_cache
def commit() -> str:
    """The current commit, with "-dirty" if files differ from it. The environment variable DLVAE_COMMIT overrides it."""
    if given := os.environ.get("DLVAE_COMMIT"):
        return given
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        # Result files of earlier runs do not affect the measurement.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return f"{name}-dirty" if changed else name
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def environment(device: torch.device) -> dict[str, str]:
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": commit(),
    }


def completed(rows: Iterable[Row], device: torch.device) -> list[Row]:
    """Rows of measurements with device, versions and commit."""
    common = environment(device)
    own = f"torch {common.pop('torch')}" + (f", triton {_version('triton')}" if device.type == "cuda" else "")
    table = []
    for row in rows:
        package = row.pop("package", None)
        versions = f"{own}, {package} {_version(package)}" if package else own
        table.append({**row, **common, "versions": versions})
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


@contextmanager
def writing(path: Path, columns: Iterable[str] = COLUMNS) -> Iterator[Callable[[list[Row]], None]]:
    """Write a CSV file with the ending .partial row by row. It replaces `path` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()

        def add(rows: list[Row]) -> None:
            writer.writerows(rows)
            file.flush()

        yield add
    os.replace(partial, path)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_training(runs: list[Path], path: Path, device: torch.device) -> None:
    """Collect the summaries of finished training runs in a CSV file."""
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs]
    rows = [{**each, **environment(device)} for each in summaries]
    with writing(path, rows[0]) as add:
        add(rows)


def line(row: Row) -> str:
    """A row formatted for the terminal."""
    name = f"{row['op']:<18} {row['pass']:<8} {row['workload']:<18} {row['size']:<24} {row['implementation']:<31}"
    if "ms" not in row:
        return f"{name} {row['status']}"
    ratio = f"{row['ratio']:>7} ({row['ratio_p20']} to {row['ratio_p80']})" if "ratio" in row else ""
    limit = f"{row['limit_percent']:>5} % of the limit" if "limit_percent" in row else ""
    memory = f"{row['peak_mb']:>7} MB" if "peak_mb" in row else ""
    differing = f", {float(row['differing']):.2%} differ" if row.get("differing") else ""
    return f"{name} {row['ms']:>8} ms  ratio {ratio}  {limit} {memory}  {row['status']}{differing}"

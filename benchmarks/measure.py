"""Timing of contenders against each other, and the CSV rows that keep it."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .registry import Case

COLUMNS = ("op", "size", "contender", "milliseconds", "ratio", "device", "threads", "torch", "commit")
_ROUNDS = 7


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return next(models, f":{platform.processor()}").partition(":")[2].strip()


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    try:
        words = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rows(case: Case, device: torch.device) -> list[dict[str, str]]:
    """Time the contenders of a case, interleaved; a row for each, with its time over ours."""
    torch.manual_seed(0)
    contenders = case.contenders(device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(_ROUNDS + 1):
        for name, run in contenders.items():
            seconds[name].append(_time(run, device))
    # The first round warms up.
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ours = next(iter(medians.values()))
    return [
        {
            "op": case.op,
            "size": " x ".join(map(str, case.size)),
            "contender": name,
            "milliseconds": f"{1e3 * median:.3f}",
            "ratio": f"{median / ours:.2f}",
            **environment(device),
        }
        for name, median in medians.items()
    ]


def environment(device: torch.device) -> dict[str, str]:
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": commit(),
    }


def write(path: Path, table: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _time(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin

"""Running the registry: a selection of it, or the standard set of a device."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from . import ceilings, measure, results, targets
from .entry import Entry, Size
from .registry import ENTRIES

# Where cost is measured as sizes grow, these are enough.
_GROWTH_BASELINES = ("plain PyTorch", "torch.compile", "faiss-cpu", "flash-kmeans")


def select(ops: list[str] | None, sizes: list[str] | None, device: torch.device) -> list[tuple[Entry, Size]]:
    """The entries and sizes that are asked for; None: all of the device.

    Args:
        ops: names of entries.
        sizes: parts of names of workloads, or sizes as "4096x512x64" (N, K, D and, where atoms are kept, k), which
            need not be in the registry.
    Raises:
        ValueError: nothing has such a name.
    """
    for name in ops or ():
        if name not in ENTRIES:
            raise ValueError(f"op is {name!r}; it needs to be one of {', '.join(ENTRIES)}")
    found = []
    for entry in (ENTRIES[name] for name in ops or ENTRIES):
        of_device = entry.sizes[device.type]
        for size in of_device if sizes is None else [each for text in sizes for each in _sizes(text, of_device)]:
            found.append((entry, size))
    if not found:
        raise ValueError(
            f"size is {', '.join(sizes or ())}; it needs to be NxKxD, NxKxDxk or (part of) a workload's name"
        )
    return found


def _sizes(text: str, among: tuple[Size, ...]) -> list[Size]:
    if re.fullmatch(r"\d+( ?x ?\d+){2,3}", text):
        numbers = list(map(int, re.findall(r"\d+", text)))
        if min(numbers) < 1:
            raise ValueError(f"size is {text!r}; its numbers need to be at least 1")
        n, k, d, kept = [*numbers, 1][:4]
        return [Size("custom", n, k, d, kept)]
    return [each for each in among if text.lower() in each.workload.lower()]


def rows(
    cases: Iterable[tuple[Entry, Size]],
    device: torch.device,
    *,
    baselines: list[str] | None = None,
    backend: str | None = None,
    seconds: float = 2.0,
    deadline: float = float("inf"),
) -> Iterator[list[results.Row]]:
    """Measure case after case, printing; the rows of each. `deadline` is in time.monotonic()."""
    limits = ceilings.measure(device)
    yield results.completed(limits.rows(), device)
    for entry, size in cases:
        if time.monotonic() > deadline:
            left = {"op": entry.name, "pass": "forward", "workload": size.workload, "size": str(size)}
            found = [{**left, "contender": "dlvae_kernels", "status": "left out: no time was left"}]
        else:
            names = _GROWTH_BASELINES if size.workload == "growth" and baselines is None else baselines
            race = measure.race(entry, size, device, names=names, backend=backend, seconds=seconds)
            found = measure.rows(race, entry, size, limits)
        for row in found:
            print(results.line(row), flush=True)
        yield results.completed(found, device)


def standard(device: torch.device, path: Path, seconds: float = 2.0, deadline: float = float("inf")) -> int:
    """The whole registry of a device into a CSV file; returns 1 where ours fails or its answer is wrong."""
    status = 0
    aims = {(target.op, target.size) for target in targets.TARGETS[device.type]}

    def comes(case: tuple[Entry, Size]) -> tuple[bool, int]:
        # A deadline leaves out first what no target is held against, then the later sizes of each entry.
        entry, size = case
        return (entry.name, size) not in aims, entry.sizes[device.type].index(size)

    cases = sorted(select(None, None, device), key=comes)
    with results.writing(path) as add:
        for table in rows(cases, device, seconds=seconds, deadline=deadline):
            add(table)
            status |= int(any_of_ours_is_wrong(table))
    return status


def any_of_ours_is_wrong(table: list[results.Row]) -> bool:
    """Whether an answer of ours is wrong, or ours raised an error."""
    ours = [row for row in table if row.get("contender", "").startswith("dlvae_kernels")]
    wrong = [row for row in ours if row["status"] == "wrong"]
    failed = [row for row in ours if row["status"].startswith("failed")]
    for row in wrong:
        print(f"WRONG: {row['op']} at {row['size']} errs by {row['error']}; its times mean nothing")
    for row in failed:
        print(f"FAILED: {row['op']} at {row['size']}: {row['status']}")
    return bool(wrong or failed)

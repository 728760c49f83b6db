"""Running the registry: a selection of its entries and sizes, measured into a CSV file."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from . import ceilings, measure, results, targets
from .entry import LIBRARY, Entry
from .inputs import Size
from .registry import ENTRIES

# The baselines of the workload "growth", which shows how the cost grows with N, K and D.
_GROWTH_BASELINES = ("plain PyTorch", "torch.compile", "faiss-cpu", "flash-kmeans")

Case = tuple[Entry, Size]


def select(
    ops: list[str] | None, sizes: list[str] | None, device: torch.device, entries: Mapping[str, Entry] = ENTRIES
) -> list[Case]:
    """The selected entries and sizes of a device; None selects all.

    Args:
        ops: names of entries.
        sizes: parts of names of workloads, or sizes such as "4096x512x64" (N, K, D and optionally k), which need not
            be in the registry.
    Raises:
        ValueError: a name is unknown.
    """
    for name in ops or ():
        if name not in entries:
            raise ValueError(f"expected op to be one of {', '.join(entries)}, got {name!r}")
    found = []
    for entry in (entries[name] for name in ops or entries):
        available = entry.sizes[device.type]
        chosen = available if sizes is None else [each for text in sizes for each in _sizes(text, available)]
        found += [(entry, size) for size in chosen]
    if not found:
        got = ", ".join(sizes or ())
        raise ValueError(f"expected size to be NxKxD, NxKxDxk or part of the name of a workload, got {got}")
    return found


def _sizes(text: str, available: tuple[Size, ...]) -> list[Size]:
    if re.fullmatch(r"\d+( ?x ?\d+){2,3}", text):
        n, k, d, selected = [*map(int, re.findall(r"\d+", text)), 1][:4]
        if min(n, k, d, selected) < 1:
            raise ValueError(f"expected the numbers of size to be at least 1, got {text!r}")
        return [Size("custom", n, k, d, selected)]
    return [each for each in available if text.lower() in each.workload.lower()]


def standard(device: torch.device) -> list[Case]:
    """All entries and sizes of a device. A deadline leaves out sizes without a target, then later sizes of an entry."""
    aims = {(target.op, target.size) for target in targets.TARGETS[device.type]}

    def priority(case: Case) -> tuple[bool, int]:
        entry, size = case
        return (entry.name, size) not in aims, entry.sizes[device.type].index(size)

    return sorted(select(None, None, device), key=priority)


def rows(
    cases: Iterable[Case],
    device: torch.device,
    *,
    baselines: list[str] | None = None,
    backend: str | None = None,
    seconds: float = 2.0,
    deadline: float = float("inf"),
) -> Iterator[list[results.Row]]:
    """Measure and print each case, and yield its rows. Cases after `deadline` (of time.monotonic()) are left out."""
    limits = ceilings.measure(device)
    yield results.completed(limits.rows(), device)
    for entry, size in cases:
        if time.monotonic() > deadline:
            left = {"op": entry.name, "pass": "forward", "workload": size.workload, "size": str(size)}
            found = [{**left, "implementation": LIBRARY, "status": "left out: the time was used up"}]
        else:
            names = _GROWTH_BASELINES if size.workload == "growth" and baselines is None else baselines
            race = measure.race(entry, size, device, names=names, backend=backend, seconds=seconds)
            found = measure.rows(race, entry, size, limits)
        for row in found:
            print(results.line(row), flush=True)
        yield results.completed(found, device)


def write(cases: Iterable[Case], device: torch.device, path: Path | None, **options: Any) -> int:
    """Measure cases into a CSV file, if there is a path. Returns 1 if this library fails or an answer of it is wrong.

    Args:
        options: those of `rows`.
    """
    status = 0
    with results.writing(path) if path else nullcontext(lambda rows: None) as add:
        for table in rows(cases, device, **options):
            add(table)
            status |= int(is_library_wrong(table))
    return status


def is_library_wrong(table: list[results.Row]) -> bool:
    """Whether an answer of this library is wrong or this library raised an exception; prints each such row."""
    wrong = [
        row
        for row in table
        if row.get("implementation", "").startswith(LIBRARY) and row["status"].startswith(("wrong", "failed"))
    ]
    for row in wrong:
        print(f"INVALID: {row['op']} at {row['size']}: {row['status']}, error {row.get('error', 'unknown')}")
    return bool(wrong)

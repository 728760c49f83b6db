"""Figures of the committed rows: how time and memory grow, and every workload with every baseline."""

from __future__ import annotations

import hashlib
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import results
from .entry import LIBRARY
from .registry import ENTRIES
from .results import Row

_COLORS = {
    LIBRARY: "#c1121f",
    f"{LIBRARY}, autocast": "#f08a8f",
    "plain PyTorch": "#4c78a8",
    "plain PyTorch, tf32": "#9ecae9",
    "torch.compile": "#54a24b",
    "torch.cdist": "#b279a2",
    "faiss-cpu": "#e08a1e",
    "scikit-learn": "#8c6d5a",
    "flash-kmeans": "#2a9d8f",
}
_OTHER_COLOR = "#9d9d9d"
_AXES = ("N", "K", "D")
_COLUMNS = 4  # of panels


def write(csv: Path, folder: Path) -> list[Path]:
    """Draw growth, memory and workloads of a CSV file as PNG files that carry the hash of the CSV file.

    Raises:
        FileNotFoundError: the CSV file does not exist.
    """
    rows = [row for row in results.read(csv) if row["ms"]]
    digest = hashlib.sha256(csv.read_bytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for draw in (growth, memory, workloads):
        paths.append(folder / f"{csv.stem}-{draw.__name__}.png")
        draw(rows).savefig(paths[-1], dpi=80, metadata={"Source": digest})
    return paths


def growth(rows: list[Row]) -> Figure:
    """Time of nearest_code against each of N, K and D, with the other two fixed."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for place, axes in enumerate(figure.subplots(1, 3, sharey=True)):
        _draw_curves(axes, rows, place, "ms")
        axes.set_ylabel("milliseconds" if place == 0 else "")
    axes.legend(fontsize=9, frameon=False)
    figure.suptitle(f"Time of nearest_code ({_machine(rows)})")
    return figure


def memory(rows: list[Row]) -> Figure:
    """Peak memory of nearest_code against K."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    _draw_curves(axes, rows, 1, "peak_mb")
    axes.set(ylabel="MB beyond the inputs", title="Peak memory of nearest_code")
    axes.legend(fontsize=9, frameon=False)
    return figure


def workloads(rows: list[Row]) -> Figure:
    """A panel for each operation, workload and pass: a bar for each implementation, with 20th and 80th percentile."""
    panels: dict[tuple[str, ...], list[Row]] = {}
    for op in ENTRIES:
        for row in rows:
            if row["op"] == op and row["workload"] != "growth":
                panels.setdefault((op, row["pass"], row["workload"], row["size"]), []).append(row)
    lines = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4.1 * _COLUMNS, 1.75 * lines), layout="constrained")
    places = figure.subplots(lines, _COLUMNS, squeeze=False).flatten()
    for axes, ((op, name, workload, size), group) in zip(places, panels.items(), strict=False):
        names = [row["implementation"] for row in group]
        times, low, high = ([float(row[key]) for row in group] for key in ("ms", "ms_p20", "ms_p80"))
        spread = [[m - a for m, a in zip(times, low, strict=True)], [b - m for m, b in zip(times, high, strict=True)]]
        colors = [_COLORS.get(each, _OTHER_COLOR) for each in names]
        axes.barh(names, times, color=colors, xerr=spread, error_kw={"lw": 1, "ecolor": "#333333"})
        axes.invert_yaxis()
        axes.set_title(f"{op}, {name}\n{workload}: {size}", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(f"Milliseconds, shorter is better ({_machine(rows)})")
    return figure


def _draw_curves(axes: Axes, rows: list[Row], place: int, column: str) -> None:
    """Draw a curve for each implementation along N, K or D (place 0, 1, 2), with the other two fixed."""
    found = [(tuple(map(int, row["size"].split(" x "))), row) for row in rows if row["workload"] == "growth"]
    middle = found[0][0]
    others = [i for i in range(3) if i != place]
    for name in dict.fromkeys(row["implementation"] for _, row in found):
        points = sorted(
            (size[place], float(row[column]))
            for size, row in found
            if row["implementation"] == name and row[column] and all(size[i] == middle[i] for i in others)
        )
        width, color = 2.5 if name == LIBRARY else 1.5, _COLORS.get(name, _OTHER_COLOR)
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=width, label=name, color=color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(f"{_AXES[place]}  ({', '.join(f'{_AXES[i]} = {middle[i]}' for i in others)})")
    axes.grid(alpha=0.3)


def _machine(rows: list[Row]) -> str:
    return f"{rows[0]['device']}, {rows[0]['threads']} threads"

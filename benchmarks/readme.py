"""The tables of the README, made from the committed rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from . import results
from .registry import ENTRIES

_BEGIN, _END = "<!-- results: make readme-table -->", "<!-- end of results -->"
# Of nearest_code these workloads stand in the table, of all else the first; the CSV has the rest.
_SHOWN = ("VQ-VAE, CIFAR-10", "VQGAN", "LlamaGen", "Mimi, streaming")


def table() -> str:
    """Markdown of the CSV files in benchmarks/results/."""
    lines = [*_training_lines()]
    for name in ("cpu", "gpu"):
        path = results.FOLDER / f"{name}.csv"
        if path.exists():
            lines += ["", *_operation_lines(results.read(path), path.name)]
    return "\n".join(lines)


def _training_lines() -> Iterator[str]:
    training = results.read(results.FOLDER / "training-cpu.csv")
    first = training[0]
    yield f"Training on {first['data']}, {first['threads']} threads of {first['device']}, torch {first['torch']}:"
    yield ""
    yield "| model | updates | training | held-out NMSE | PSNR | perplexity | codes in use |"
    yield "|---|---|---|---|---|---|---|"
    for row in training:
        yield (
            f"| {row['model']} | {row['updates']} | {float(row['training_seconds']):.0f} s | {float(row['nmse']):.4f} |"
            f" {float(row['psnr']):.1f} dB | {float(row['perplexity']):.0f} of {row['num_embeddings']} |"
            f" {float(row['in_use']):.0%} |"
        )


def _operation_lines(rows: list[dict[str, str]], file: str) -> Iterator[str]:
    timed = [row for row in rows if row["ms"]]
    first = timed[0]
    others = [row for row in timed if row["contender"] != "dlvae_kernels"]
    slower = sum(float(row["ratio"]) < 1 for row in others)
    yield (
        f"Each operation beside what users would pick instead, {first['threads']} threads of {first['device']},"
        f" {first['versions']}. A ratio is their time over ours, forward / backward: **above 1 ours is faster**, below"
        f" theirs is. Of all {len(others)} ratios in [{file}](benchmarks/results/{file}), {slower} are below 1; between"
        f" rounds a ratio varies by {_noise(others):.0%} (half the way from the 20th to the 80th percentile, median)."
        f"{_agreement(rows, file)}"
    )
    yield ""
    yield "| operation | N x K x D (x k) | ours, ms | backend | peak, MB | ratios |"
    yield "|---|---|---|---|---|---|"
    for op in ENTRIES:
        found = [row for row in timed if row["op"] == op and row["workload"] != "growth"]
        sizes = [list(group) for _, group in groupby(found, key=lambda row: (row["workload"], row["size"]))]
        for group in sizes if op == "nearest_code" else sizes[:1]:
            if op != "nearest_code" or group[0]["workload"] in _SHOWN:
                yield _line(group)


def _line(rows: list[dict[str, str]]) -> str:
    contenders = {name: list(group) for name, group in groupby(rows, key=lambda row: row["contender"])}
    ours = contenders.pop("dlvae_kernels")
    ratios = [f"{name} {_joined(group, 'ratio', _two_digits)}{_flag(group)}" for name, group in contenders.items()]
    cells = (
        ours[0]["op"],
        f"{ours[0]['size']} ({ours[0]['workload']})",
        _joined(ours, "ms", _two_digits),
        ours[0]["backend"],
        _joined(ours[-1:], "peak_mb", lambda value: f"{value:.0f}"),
        "; ".join(ratios),
    )
    return f"| {' | '.join(cells)} |"


def _joined(rows: list[dict[str, str]], column: str, form: Callable[[float], str]) -> str:
    """A column's values of forward and backward."""
    return " / ".join(form(float(row[column])) for row in rows if row[column])


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _flag(rows: list[dict[str, str]]) -> str:
    return " (wrong)" if rows[0]["status"] == "wrong" else ""


def _agreement(rows: list[dict[str, str]], file: str) -> str:
    """How far an earlier run of the same set agrees, where there is one."""
    again = results.FOLDER / file.replace(".", "-again.")
    if not again.exists():
        return ""
    return f" Beside an earlier run ({again.name}): {results.compare(rows, results.read(again))[-1]}."


def _noise(rows: list[dict[str, str]]) -> float:
    halves = sorted((float(row["ratio_p80"]) - float(row["ratio_p20"])) / 2 / float(row["ratio"]) for row in rows)
    return halves[len(halves) // 2]


def updated(readme: str) -> str:
    """The README with the tables of today's rows."""
    head, _, rest = readme.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    if not tail:
        raise ValueError(f"README.md holds no {_BEGIN} ... {_END}")
    return f"{head}{_BEGIN}\n\n{table()}\n\n{_END}{tail}"

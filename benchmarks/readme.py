"""The tables of README.md and docs/benchmarks.md, generated from the committed rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from . import results
from .registry import ENTRIES

_BEGIN, _END = "<!-- results: make readme-table -->", "<!-- end of results -->"
# The full table shows these workloads of nearest_code, and the first workload of every other operation.
_SHOWN = ("VQ-VAE, CIFAR-10", "VQGAN", "LlamaGen", "Mimi, streaming")
# The rows of the table in README.md.
_SUMMARY = (
    ("nearest_code", "VQ-VAE, CIFAR-10"),
    ("nearest_code", "LlamaGen"),
    ("VectorQuantizer", "VQ-VAE, CIFAR-10"),
    ("VectorQuantizerEMA", "VQ-VAE, CIFAR-10"),
    ("DictionaryLearning", "dictionary VAE"),
    ("SparseAutoencoder", "sparse autoencoder, small"),
)
_HEADER = "| operation | N x K x D (x k) | time, ms | backend | peak memory, MB | speed-up over |"


def summary() -> str:
    """Markdown of the speed-up table in README.md."""
    rows = [row for row in results.read(results.FOLDER / "cpu.csv") if row["ms"]]
    lines = [
        f"Measured on {_machine(rows)}: time and speed-up of the forward / backward pass.",
        "",
        "| operation | N x K x D (x k) | time, ms | speed-up over |",
        "|---|---|---|---|",
    ]
    for op, workload in _SUMMARY:
        found = [row for row in rows if (row["op"], row["workload"]) == (op, workload)]
        name, size, time, _, _, ratios = _cells(found)
        lines.append(f"| {name} | {size} | {time} | {ratios} |")
    return "\n".join(lines)


def table() -> str:
    """Markdown of the tables in docs/benchmarks.md."""
    lines = [*_training_lines(), "", *_update_lines()]
    for name in ("cpu", "gpu"):
        path = results.FOLDER / f"{name}.csv"
        if path.exists():
            lines += ["", *_operation_lines(results.read(path), path.name)]
    return "\n".join(lines)


# The generated part of each page.
PAGES: dict[str, Callable[[], str]] = {"README.md": summary, "docs/benchmarks.md": table}


def _training_lines() -> Iterator[str]:
    training = results.read(results.FOLDER / "training-cpu.csv")
    first = training[0]
    yield f"Training on {first['data']}, {first['threads']} threads of {first['device']}, torch {first['torch']}:"
    yield ""
    yield "| model | updates | training | held-out NMSE | PSNR | perplexity | active codes |"
    yield "|---|---|---|---|---|---|---|"
    for row in training:
        yield (
            f"| {row['model']} | {row['updates']} | {float(row['training_seconds']):.0f} s | {float(row['nmse']):.4f} |"
            f" {float(row['psnr']):.1f} dB | {float(row['perplexity']):.0f} of {row['num_embeddings']} |"
            f" {float(row['utilisation']):.0%} |"
        )


def _update_lines() -> Iterator[str]:
    rows = results.read(results.FOLDER / "updates-cpu.csv")
    yield "Time of a training update with the notebook's hyper-parameters (batch of 256), on the same machine:"
    yield ""
    yield "| model | implementation | precision | ms | relative to dlvae_kernels in float32 |"
    yield "|---|---|---|---|---|"
    for row in rows:
        cells = (row["model"], row["contender"], row["precision"], f"{float(row['ms']):.0f}")
        yield f"| {' | '.join(cells)} | {_two_digits(float(row['ratio']))} |"


def _operation_lines(rows: list[dict[str, str]], file: str) -> Iterator[str]:
    timed = [row for row in rows if row["ms"]]
    others = [row for row in timed if row["contender"] != "dlvae_kernels"]
    slower = sum(float(row["ratio"]) < 1 for row in others)
    yield (
        f"Each operation and its baselines, on {_machine(timed)}. A speed-up is the time of the baseline divided by the"
        f" time of dlvae_kernels, forward / backward: **above 1 dlvae_kernels is faster**, below 1 the baseline is. Of"
        f" all {len(others)} speed-ups in [{file}](../benchmarks/results/{file}), {slower} are below 1. Between rounds"
        f" a speed-up varies by {_noise(others):.0%} (half the distance from the 20th to the 80th percentile, median)."
        f"{_agreement(rows, file)}"
    )
    yield ""
    yield _HEADER
    yield "|---|---|---|---|---|---|"
    for op in ENTRIES:
        found = [row for row in timed if row["op"] == op and row["workload"] != "growth"]
        sizes = [list(group) for _, group in groupby(found, key=lambda row: (row["workload"], row["size"]))]
        for group in sizes if op == "nearest_code" else sizes[:1]:
            if op != "nearest_code" or group[0]["workload"] in _SHOWN:
                yield f"| {' | '.join(_cells(group))} |"


def _machine(rows: list[dict[str, str]]) -> str:
    return f"{rows[0]['threads']} threads of {rows[0]['device']}, {rows[0]['versions']}"


def _cells(rows: list[dict[str, str]]) -> tuple[str, str, str, str, str, str]:
    contenders = {name: list(group) for name, group in groupby(rows, key=lambda row: row["contender"])}
    ours = contenders.pop("dlvae_kernels")
    ratios = [f"{name} {_joined(group, 'ratio', _two_digits)}{_flag(group)}" for name, group in contenders.items()]
    return (
        ours[0]["op"],
        f"{ours[0]['size']} ({ours[0]['workload']})",
        _joined(ours, "ms", _two_digits),
        ours[0]["backend"],
        _joined(ours[-1:], "peak_mb", lambda value: f"{value:.0f}"),
        "; ".join(ratios),
    )


def _joined(rows: list[dict[str, str]], column: str, form: Callable[[float], str]) -> str:
    """The values of a column, forward / backward."""
    return " / ".join(form(float(row[column])) for row in rows if row[column])


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _flag(rows: list[dict[str, str]]) -> str:
    return " (wrong)" if rows[0]["status"] == "wrong" else ""


def _agreement(rows: list[dict[str, str]], file: str) -> str:
    """The agreement with an earlier run of the same set, if there is one."""
    again = results.FOLDER / file.replace(".", "-again.")
    if not again.exists():
        return ""
    return f" Compared with an earlier run ({again.name}): {results.compare(rows, results.read(again))[-1]}."


def _noise(rows: list[dict[str, str]]) -> float:
    halves = sorted((float(row["ratio_p80"]) - float(row["ratio_p20"])) / 2 / float(row["ratio"]) for row in rows)
    return halves[len(halves) // 2]


def updated(page: str, text: str) -> str:
    """The text of a page of PAGES, with the tables of the committed rows.

    Raises:
        ValueError: the text has no markers around a table.
    """
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    if not tail:
        raise ValueError(f"{page} holds no {_BEGIN} ... {_END}; add both lines where the table belongs")
    return f"{head}{_BEGIN}\n\n{PAGES[page]()}\n\n{_END}{tail}"


def write() -> None:
    """Write the tables into all pages."""
    for page in PAGES:
        path = results.ROOT / page
        path.write_text(updated(page, path.read_text(encoding="utf-8")), encoding="utf-8")

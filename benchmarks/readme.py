"""The tables of README.md and docs/benchmarks.md, generated from the committed rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from . import codec, compat, results
from .entry import LIBRARY
from .layers import NOTEBOOK
from .registry import ENTRIES
from .results import Row

_BEGIN, _END = "<!-- results: make readme-table -->", "<!-- end of results -->"
# The full table shows these workloads of nearest_code, and the first workload of every other operation.
_SHOWN = ("VQ-VAE, CIFAR-10", "VQGAN", "LlamaGen", "Mimi, streaming")
# The rows of the table in README.md.
SUMMARY = (
    ("nearest_code", "VQ-VAE, CIFAR-10"),
    ("nearest_code", "LlamaGen"),
    ("VectorQuantizer", "VQ-VAE, CIFAR-10"),
    ("VectorQuantizerEMA", "VQ-VAE, CIFAR-10"),
    ("DictionaryLearning", "dictionary VAE"),
    ("SparseAutoencoder", "sparse autoencoder, small"),
)


def summary() -> str:
    """The text and the table of speed-ups in README.md."""
    rows = [row for row in results.read(results.FOLDER / "cpu.csv") if row["ms"]]
    text = f"Measured on {_machine(rows)}: time and speed-up of the forward / backward pass."
    lines = []
    for op, workload in SUMMARY:
        found = [row for row in rows if (row["op"], row["workload"]) == (op, workload)]
        name, size, time, *_, ratios = _cells(found, rows[0]["device"])
        lines.append(f"{name} | {size} | {time} | {ratios}")
    return _section(text, "operation | N x K x D (x k) | time, ms | speed-up over", lines)


def tables() -> str:
    """The texts and tables in docs/benchmarks.md, one for each file of rows."""
    sections = {
        "training-cpu": _training,
        "updates-cpu": _updates,
        "latency-cpu": _latency,
        "collapse-cpu": _collapse,
        "cpu": _operations,
        "gpu": _operations,
    }
    paths = {results.FOLDER / f"{name}.csv": section for name, section in sections.items()}
    return "\n\n".join(section(results.read(path), path.name) for path, section in paths.items() if path.exists())


def codecs() -> str:
    """The text and the table of the audio codecs in docs/audio-codec.md."""
    rows = results.read(codec.PATH)
    seeds = " and ".join(sorted({row["seed"] for row in rows}))
    lines = []
    for name, levels in codec.by_level(rows).items():
        first, last = levels[0], levels[-1]
        times = (f"{two_digits(last[f'{part}_ms'])} ({last[f'{part}_ratio']:.2f})" for part in ("step", "quantizer"))
        distances = f"{first['spectral_distance']:.3f} to {last['spectral_distance']:.3f}"
        lines.append(
            " | ".join([name, f"{first['si_sdr_db']:.2f} to {last['si_sdr_db']:.2f}", distances, *times]),
        )
    text = (
        f"{rows[0]['steps']} updates, mean of the seeds {seeds}, on {_machine(rows)}. SI-SDR (higher is better) and"
        f" spectral distance (lower is better) of held-out sentences at {float(first['kbit_per_s']):g} and"
        f" {float(last['kbit_per_s']):g} kbit/s; processor time of an update and its quantizer, and its ratio to that"
        f" of {LIBRARY}:"
    )
    return _section(text, "quantizer | SI-SDR, dB | spectral distance | update, ms | its quantizer, ms", lines)


def compatible() -> str:
    """The text and the table of docs/vector-quantize-pytorch.md."""
    rows = results.read(compat.PATH)
    lines = []
    for (name, options, size), group in groupby(rows, lambda row: (row["quantizer"], row["options"], row["size"])):
        passes = {each: list(pair) for each, pair in groupby(group, lambda row: row["pass"])}
        times = [part for each in ("train", "eval") for part in _time_and_ratio(passes.get(each))]
        own, stock = passes.get("train") or passes["eval"]
        peaks = " / ".join(two_digits(float(row["peak_mb"])) for row in (own, stock))
        counts = (f"{own[key]} / {stock[key]}" for key in ("operations", "host_reads"))
        wrong = " (wrong)" * (own["status"] != "ok")
        cells = [f"`{name}`{wrong}", f"`{options}`" if options else "", size, *times, peaks, *counts]
        lines.append(" | ".join(cells))
    ratios = [float(row["ratio"]) for row in rows if row["implementation"] != LIBRARY]
    text = (
        f"Both packages with equal state on equal inputs in turns, {_machine(rows)}, {compat.VQP}"
        f" {rows[1]['versions'].split()[-1]} (`python -m benchmarks compat`). A step is a forward in train mode and its"
        f" backward. Speed-up: **above 1 {LIBRARY} is faster**; {sum(each < 1 for each in ratios)} of {len(ratios)} are"
        " below 1. Peak memory, operations and host reads, here / VQP, are those of a step, or of eval where there is"
        " no step. An operation is a dispatched operation that is not a view; a host read would wait for a GPU."
    )
    header = "quantizer | options | input and size | step, ms | speed-up | eval, ms | speed-up | peak memory, MB"
    return _section(text, f"{header} | operations | host reads", lines)


def _time_and_ratio(pair: list[Row] | None) -> tuple[str, str]:
    """The time of this library and its speed-up over the other one."""
    return (two_digits(float(pair[0]["ms"])), two_digits(float(pair[1]["ratio"]))) if pair else ("-", "-")


# The generated part of each page.
PAGES: dict[str, Callable[[], str]] = {
    "README.md": summary,
    "docs/audio-codec.md": codecs,
    "docs/benchmarks.md": tables,
    "docs/vector-quantize-pytorch.md": compatible,
}


def _section(text: str, header: str, lines: Iterable[str]) -> str:
    """A text and the table below it."""
    return "\n".join([text, "", f"| {header} |", "|---" * (header.count("|") + 1) + "|", *(f"| {x} |" for x in lines)])


def _training(rows: list[Row], file: str) -> str:
    first = rows[0]
    return _section(
        f"Training on {first['data']}, {first['threads']} threads of {first['device']}, torch {first['torch']}:",
        "model | updates | training | held-out NMSE | PSNR | perplexity | active codes",
        (
            f"{row['model']} | {row['updates']} | {float(row['training_seconds']):.0f} s | {float(row['nmse']):.4f} |"
            f" {float(row['psnr']):.1f} dB | {float(row['perplexity']):.0f} of {row['num_embeddings']} |"
            f" {float(row['utilisation']):.0%}"
            for row in rows
        ),
    )


def _updates(rows: list[Row], file: str) -> str:
    return _section(
        f"Time of a training update with the hyper-parameters of the {NOTEBOOK} (batch of 256), on {_machine(rows)}:",
        f"model | implementation | precision | ms | relative to {LIBRARY} in float32",
        (
            f"{row['model']} | {row['implementation']} | {row['precision']} | {float(row['ms']):.0f} |"
            f" {two_digits(float(row['ratio']))}"
            for row in rows
        ),
    )


def _latency(rows: list[Row], file: str) -> str:
    return _section(
        f"Time of a call, on {_machine(rows)}, instruction set {rows[0]['instruction_set']}:",
        "operation | N x K x D | implementation | us | longer than its baseline, us",
        (" | ".join(row[key] for key in ("op", "size", "implementation", "us", "over_us")) for row in rows),
    )


def _collapse(rows: list[Row], file: str) -> str:
    def key(row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in ("data", "num_codes", "vectors", "updates", "implementation", "rule"))

    lines = []
    for (data, num_codes, vectors, updates, name, rule), group in groupby(rows, key):
        runs = list(group)
        cells = (_range(runs, column) for column in _USE)
        lines.append(" | ".join([f"{data}, K = {num_codes}, N = {vectors}, {updates}", f"{name}, {rule}", *cells]))
    text = (
        "How evenly a codebook of moving averages with the constructor arguments of the VQ-VAE notebook is used after"
        f" training, by `dead_code_threshold` (`python -m benchmarks collapse`, which explains the columns; lowest to"
        f" highest of the seeds), on {rows[0]['device']}, torch {rows[0]['torch']}:"
    )
    header = "data, codes, vectors a batch, updates | quantizer | perplexity | dead, % | revived a step, % | most, % |"
    return _section(text, f"{header} churn, % | held-out NMSE", lines)


# The columns of a collapse row that the table shows.
_USE = "perplexity", "dead_percent", "revived_percent", "most_revived_percent", "churn_percent", "nmse"


def _range(runs: list[Row], column: str) -> str:
    """The lowest and the highest value of a column."""
    values = sorted(float(row[column]) for row in runs if row[column])
    if not values:
        return "-"
    low, high = (f"{float(f'{value:.3g}'):g}" for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"


def _operations(rows: list[Row], file: str) -> str:
    timed = [row for row in rows if row["ms"]]
    baselines = [row for row in timed if row["implementation"] != LIBRARY]
    slower = sum(float(row["ratio"]) < 1 for row in baselines)
    text = (
        f"Each operation and its baselines, on {_machine(timed)}. A speed-up is the time of the baseline divided by the"
        f" time of {LIBRARY}, forward / backward: **above 1 {LIBRARY} is faster**, below 1 the baseline is. Of"
        f" all {len(baselines)} speed-ups in [{file}](../benchmarks/results/{file}), {slower} are below 1. Between"
        f" rounds a speed-up varies by {_noise(baselines):.0%} (half the distance from the 20th to the 80th percentile,"
        " median)."
    )
    header = "operation | N x K x D (x k) | time, ms | backend | peak memory, MB | speed-up over"
    lines = []
    for op in ENTRIES:
        found = [row for row in timed if row["op"] == op and row["workload"] != "growth"]
        sizes = [list(group) for _, group in groupby(found, key=lambda row: (row["workload"], row["size"]))]
        for group in sizes if op == "nearest_code" else sizes[:1]:
            if op != "nearest_code" or group[0]["workload"] in _SHOWN:
                lines.append(" | ".join(_cells(group, timed[0]["device"])))
    return _section(text, header, lines)


def _machine(rows: list[Row]) -> str:
    return f"{rows[0]['threads']} threads of {rows[0]['device']}, {rows[0]['versions']}"


def _cells(rows: list[Row], device: str) -> tuple[str, ...]:
    """The cells of an operation at a size, from the rows of all implementations and passes.

    The size names the processor or GPU of the rows if it is not `device`.
    """
    by_name = {name: list(group) for name, group in groupby(rows, key=lambda row: row["implementation"])}
    library = by_name.pop(LIBRARY)
    ratios = [
        f"{name} {_joined(group, 'ratio')}{' (wrong)' * (group[0]['status'] == 'wrong')}"
        for name, group in by_name.items()
    ]
    return (
        library[0]["op"],
        f"{library[0]['size']} ({library[0]['workload']}){_other(library[0]['device'], device)}",
        _joined(library, "ms"),
        library[0]["backend"],
        f"{float(library[-1]['peak_mb']):.0f}",
        "; ".join(ratios),
    )


def _other(measured: str, device: str) -> str:
    return "" if measured == device else f", {measured}"


def _joined(rows: list[Row], column: str) -> str:
    """The values of a column, forward / backward."""
    return " / ".join(two_digits(float(row[column])) for row in rows)


def two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _noise(rows: list[Row]) -> float:
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

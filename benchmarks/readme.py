"""The table of the README, made from the committed rows alone."""

from __future__ import annotations

from pathlib import Path

from . import measure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_BEGIN, _END = "<!-- results: make readme-table -->", "<!-- end of results -->"


def table() -> str:
    """Markdown of benchmarks/results/training-cpu.csv and ops-cpu.csv."""
    training = measure.read(RESULTS / "training-cpu.csv")
    lines = [
        f"Training on {training[0]['data']}, {training[0]['threads']} threads of {training[0]['device']},"
        f" torch {training[0]['torch']}:",
        "",
        "| model | updates | training | held-out NMSE | PSNR | perplexity | codes in use |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in training:
        lines.append(
            f"| {row['model']} | {row['updates']} | {float(row['training_seconds']):.0f} s | {float(row['nmse']):.4f} |"
            f" {float(row['psnr']):.1f} dB | {float(row['perplexity']):.0f} of {row['num_embeddings']} |"
            f" {float(row['in_use']):.0%} |"
        )
    operations = measure.read(RESULTS / "ops-cpu.csv")
    lines += [
        "",
        "The reference backend beside the plain float32 expression, the same machine (ratio above 1: ours is faster):",
        "",
        "| operation | N x K x D (x k) | ours | plain PyTorch | ratio |",
        "|---|---|---|---|---|",
    ]
    for ours, plain in zip(operations[::2], operations[1::2], strict=True):
        lines.append(
            f"| {ours['op']} | {ours['size']} | {float(ours['milliseconds']):.1f} ms |"
            f" {float(plain['milliseconds']):.1f} ms | {plain['ratio']} |"
        )
    return "\n".join(lines)


def updated(readme: str) -> str:
    """The README with the table of today's rows."""
    head, _, rest = readme.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    if not tail:
        raise ValueError(f"README.md holds no {_BEGIN} ... {_END}")
    return f"{head}{_BEGIN}\n\n{table()}\n\n{_END}{tail}"

"""Compare this library with the implementations that users would otherwise choose.

`python -m benchmarks` lists the entries; `python -m benchmarks --op nearest_code` measures one of them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlvae_kernels.functional.checks import check_size
from models.training.device import pick_device

from . import codec, collapse, compat, gpu, latency, plot, readme, results, run, targets, training, verify
from .registry import ENTRIES

_RECIPES = f"default: all; one of {', '.join(map(repr, training.RECIPES))}"


def _list() -> None:
    for entry in ENTRIES.values():
        print(entry.name)
        for device, sizes in entry.sizes.items():
            print(f"  {device}:", "; ".join(f"{size.workload} {size} {size.precision}" for size in sizes))
        print("  baselines:", "; ".join(each.name for each in entry.implementations[1:]))


def _measure(given: argparse.Namespace) -> int:
    device = pick_device(given.device)
    cases = run.select(given.op, given.size, device)
    known = {each.name for entry, _ in cases for each in entry.implementations}
    for name in given.baseline or ():
        if name not in known:
            raise ValueError(f"expected baseline to be one of {', '.join(sorted(known))}, got {name!r}")
    return run.write(cases, device, given.csv, baselines=given.baseline, backend=given.backend)


def _standard(given: argparse.Namespace) -> int:
    device = pick_device(given.device)
    path = given.csv or results.FOLDER / f"{'gpu' if device.type == 'cuda' else 'cpu'}.csv"
    options = {"seconds": given.seconds, "deadline": time.monotonic() + given.within}
    status = run.write(run.standard(device), device, path, **options)
    print(*targets.check(results.read(path), device.type), sep="\n")
    return status


def _latency(given: argparse.Namespace) -> int:
    return latency.write(given.csv, given.size, given.seconds)


def _updates(given: argparse.Namespace) -> None:
    device = pick_device(given.device)
    check_size("updates", given.updates, 1)
    check_size("rounds", given.rounds, 1)
    path = given.csv or results.FOLDER / f"updates-{device.type}.csv"
    training.measure_updates(device, path, given.updates, given.rounds)


def _recipes(given: argparse.Namespace) -> None:
    training.measure_recipes(given.recipe, given.data, given.seed, given.most, given.csv)


def _verify(given: argparse.Namespace) -> None:
    print(*verify.verify(given.op, given.size, given.base, pick_device(given.device)), sep="\n")


def _plot(given: argparse.Namespace) -> None:
    for csv in sorted(results.FOLDER.glob("[cg]pu.csv")):
        print(*plot.write(csv, results.FOLDER), sep="\n")
    codec.draw()
    print(codec.FIGURE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.set_defaults(function=_measure)
    _add_selection(parser.add_argument, "append")
    parser.add_argument("--backend", help="backend that this library is forced to use: triton, native or reference")
    parser.add_argument("--baseline", action="append", help="baseline to measure; may be repeated; default: all")
    parser.add_argument("--csv", type=Path, help="file that the rows are also written to")
    commands = parser.add_subparsers()

    def command(name: str, function: Callable[[argparse.Namespace], int | None], help: str) -> Callable[..., Any]:
        sub = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        sub.set_defaults(function=function)
        return sub.add_argument

    add = command("standard", _standard, "measure all entries of a device into benchmarks/results/cpu.csv or gpu.csv")
    add("--device", default="cpu", help="cpu or cuda")
    add("--seconds", type=float, default=2.0, help="seconds per operation and size")
    add("--within", type=float, default=math.inf, help="start no further size after this many seconds")
    add("--csv", type=Path, help="CSV file for the rows (default: benchmarks/results/cpu.csv or gpu.csv)")
    add = command("latency", _latency, "measure the overhead of a call in microseconds, on the CPU")
    add("--size", help="NxKxD, in place of the size of each operation")
    add("--seconds", type=float, default=4.0, help="seconds per operation")
    add("--csv", type=Path, default=latency.PATH, help="file of the rows; default: benchmarks/results/latency-cpu.csv")
    add = command("gpu", lambda given: gpu.main(given.within, given.only), "test, benchmark and train on a GPU")
    add("--only", nargs="+", choices=gpu.STEPS, help="steps to run; default: all")
    add("--within", type=float, default=560, help="time limit of all steps together, in seconds")
    add = command("updates", _updates, "time training updates of this library and of the VQ-VAE notebook")
    add("--device", default="cpu", help="cpu or cuda")
    add("--updates", type=int, default=20, help="updates in each round")
    add("--rounds", type=int, default=3, help="rounds in which the implementations take turns")
    add("--csv", type=Path, help="file of the rows; default: benchmarks/results/updates-DEVICE.csv")
    add = command("recipes", _recipes, f"count the updates of training recipes to an NMSE of {training.TARGET}")
    add("--recipe", nargs="+", choices=training.RECIPES, default=list(training.RECIPES), metavar="NAME", help=_RECIPES)
    add("--data", nargs="+", default=["patches", "fashion-mnist"], help="as in models.train --data")
    add("--seed", nargs="+", type=int, default=[0, 1, 2], help="seeds of the runs")
    add("--most", type=int, default=1000, help="maximum number of updates of a run")
    add("--csv", type=Path, default=results.FOLDER / "recipes.csv", help="file that the rows are appended to")
    add = command(
        "collapse",
        lambda given: collapse.write(given.study, given.csv),
        "train with each rule that revives dead codes, and measure how evenly the codebook is used",
    )
    add("--study", nargs="+", choices=collapse.STUDIES, default=list(collapse.STUDIES), help="studies to run")
    add(
        "--csv", type=Path, default=collapse.PATH, help="file of the rows; default: benchmarks/results/collapse-cpu.csv"
    )
    add = command(
        "codec",
        lambda given: codec.write(given.wav, given.steps, given.seed, given.csv),
        "train the audio codec of examples/ with the residual quantizers of two libraries",
    )
    add("--wav", type=Path, help="folder of WAV files; default: speech of espeak-ng")
    add("--steps", type=int, default=300, help="updates of each codec")
    add("--seed", nargs="+", type=int, default=[0, 1], help="seeds of the runs")
    add("--csv", type=Path, default=codec.PATH, help="file of the rows; default: benchmarks/results/codec-cpu.csv")
    add = command(
        "compat",
        lambda given: compat.write(given.csv, given.only, given.seconds),
        "compare the quantizers of dlvae_kernels.compat with those of vector-quantize-pytorch, on the CPU",
    )
    add("--only", metavar="NAME", help="part of the quantizers and options to measure, such as cosine; default: all")
    add("--seconds", type=float, default=2.0, help="seconds per quantizer and pass")
    add("--csv", type=Path, default=compat.PATH, help="file of the rows; default: benchmarks/results/compat-cpu.csv")
    add = command(
        "train",
        lambda given: results.write_training(given.runs, results.FOLDER / "training-cpu.csv", pick_device("cpu")),
        "collect finished CPU runs in benchmarks/results/training-cpu.csv",
    )
    add("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    add = command("verify", _verify, "test an operation, then compare its time with that of another commit")
    _add_selection(add, "store")
    add("--base", default="main", help="the commit to compare with")
    command("plot", _plot, "draw the PNG files of the rows in benchmarks/results/")
    command("readme-table", lambda given: readme.write(), "write the tables of README.md and docs/")
    return parser


def _add_selection(add: Callable[..., Any], op: str) -> None:
    add("--op", action=op, required=op == "store", help=f"one of {', '.join(ENTRIES)}")
    add("--size", action="append", help="part of a workload's name, or NxKxD[xk]; may be repeated")
    add("--device", default="cpu", help="cpu or cuda")


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if not words:
        _list()
        return 0
    given = _parser().parse_args(words)
    try:
        return given.function(given) or 0
    except (ValueError, OSError, verify.RefusedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""Measure ours against what users would pick instead.

`python -m benchmarks` lists what there is, `python -m benchmarks --op nearest_code` measures a part of it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dlvae_kernels.functional.checks import check_size
from models.training.device import pick_device

from . import gpu, plot, readme, recipes, results, run, targets, updates, verify
from .registry import ENTRIES


def _list() -> None:
    for entry in ENTRIES.values():
        print(entry.name)
        for device, sizes in entry.sizes.items():
            print(f"  {device}:", "; ".join(f"{size.workload} {size} {size.precision}" for size in sizes))
        print("  beside:", "; ".join(each.name for each in entry.contenders[1:]))


def _measure(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    cases = run.select(arguments.op, arguments.size, device)
    known = {each.name for entry, _ in cases for each in entry.contenders}
    for name in arguments.baseline or ():
        if name not in known:
            raise ValueError(f"baseline is {name!r}; it needs to be one of {', '.join(sorted(known))}")
    status = 0
    with results.writing(arguments.csv) if arguments.csv else nullcontext(lambda rows: None) as add:
        for table in run.rows(cases, device, baselines=arguments.baseline, backend=arguments.backend):
            add(table)
            status |= int(run.any_of_ours_is_wrong(table))
    return status


def _verify(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    cases = run.select([arguments.op], arguments.size, device)
    sizes = [size for _, size in cases if arguments.size or size.workload != "growth"]
    print(*verify.verify(cases[0][0], sizes, arguments.base, device), sep="\n")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    print(*results.compare(results.read(arguments.first), results.read(arguments.second)), sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    _add_selection(parser.add_argument, "append")
    parser.add_argument("--backend", help="force ours onto it: triton, native or reference")
    parser.add_argument("--baseline", action="append", help="only beside this one; may be repeated")
    parser.add_argument("--csv", type=Path, help="write the rows to this file too")
    commands = parser.add_subparsers(dest="command")
    whole = commands.add_parser("standard", help="all of a device, into benchmarks/results/cpu.csv or gpu.csv")
    whole.add_argument("--device", default="cpu", help="cpu or cuda")
    whole.add_argument("--seconds", type=float, default=2.0, help="to time each operation at each size")
    whole.add_argument("--within", type=float, default=math.inf, help="seconds after which none is begun")
    whole.add_argument("--csv", type=Path, help="write the rows to this file instead")
    on_gpu = commands.add_parser("gpu", help="test, time and train on a GPU; results under $OUT or benchmarks/results/")
    on_gpu.add_argument("--commit", help="what the rows say where git cannot")
    on_gpu.add_argument("--only", nargs="+", choices=gpu.STEPS, help="steps to take; by default all")
    on_gpu.add_argument("--within", type=float, default=560, help="seconds that the steps share")
    finished = commands.add_parser("train", help="collect finished CPU runs into benchmarks/results/training-cpu.csv")
    finished.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    updating = commands.add_parser("updates", help="updates a second of the notebook's training, beside its own loop")
    updating.add_argument("--device", default="cpu", help="cpu or cuda")
    updating.add_argument("--updates", type=int, default=20, help="to time in each round")
    updating.add_argument("--rounds", type=int, default=3, help="in which the contenders take turns")
    updating.add_argument("--csv", type=Path, help="where rows go; by default benchmarks/results/updates-DEVICE.csv")
    recipes.add_arguments(commands.add_parser("recipes", help="how many updates recipes of training take to an error"))
    verifies = commands.add_parser("verify", help="test an operation, then time it against another commit")
    _add_selection(verifies.add_argument, "store")
    verifies.add_argument("--base", default="main", help="the commit to compare with")
    compares = commands.add_parser("compare", help="how well the ratios of two CSV files agree")
    compares.add_argument("first", type=Path)
    compares.add_argument("second", type=Path)
    commands.add_parser("offline", help="compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU")
    commands.add_parser("plot", help="draw the PNGs of benchmarks/results/ from its CSV files")
    commands.add_parser("readme-table", help="write the tables of README.md and docs/ from benchmarks/results/")
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
    arguments = _parser().parse_args(words)
    try:
        return _run(arguments)
    except (ValueError, OSError, verify.RefusedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "gpu":
        if arguments.commit:
            os.environ["DLVAE_COMMIT"] = arguments.commit
        return gpu.main(arguments.within, arguments.only)
    if arguments.command == "offline":
        # It imports Triton's compiler.
        from . import offline

        return offline.main()
    if arguments.command == "verify":
        return _verify(arguments)
    if arguments.command == "updates":
        device = pick_device(arguments.device)
        check_size("updates", arguments.updates, 1)
        check_size("rounds", arguments.rounds, 1)
        path = arguments.csv or results.FOLDER / f"updates-{device.type}.csv"
        updates.measure(device, path, arguments.updates, arguments.rounds)
        return 0
    if arguments.command == "recipes":
        return recipes.main(arguments)
    if arguments.command == "compare":
        return _compare(arguments)
    if arguments.command == "standard":
        device = pick_device(arguments.device)
        path = arguments.csv or results.FOLDER / f"{'gpu' if device.type == 'cuda' else 'cpu'}.csv"
        status = run.standard(device, path, arguments.seconds, time.monotonic() + arguments.within)
        print(*targets.check(results.read(path), device.type), sep="\n")
        return status
    if arguments.command == "train":
        results.write_training(arguments.runs, results.FOLDER / "training-cpu.csv", torch.device("cpu"))
    elif arguments.command == "plot":
        for csv in sorted(results.FOLDER.glob("[cg]pu.csv")):
            print(*plot.write(csv, results.FOLDER), sep="\n")
    elif arguments.command == "readme-table":
        readme.write()
    else:
        return _measure(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())

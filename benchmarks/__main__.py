"""`python -m benchmarks cpu | gpu | train RUN ... | readme-table`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import measure, readme, registry

# Updates of the training run on a GPU, a length that takes well under a minute there.
_GPU_UPDATES = 2000


def operations(cases: tuple[registry.Case, ...], device: torch.device, path: Path) -> None:
    """Time all cases on a device into a CSV file, and print them."""
    table = []
    for case in cases:
        for row in measure.rows(case, device):
            table.append(row)
            print(*(row[name] for name in measure.COLUMNS[:5]), sep="  ", flush=True)
    measure.write(path, table)


def training(runs: list[Path], path: Path, device: torch.device) -> None:
    """Collect the summaries of finished runs into a CSV file."""
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs]
    measure.write(
        path,
        [{**{key: str(value) for key, value in each.items()}, **measure.environment(device)} for each in summaries],
    )


def gpu() -> int:
    """Tests on the GPU, then the benchmark, then a training run; results under $OUT or benchmarks/results/."""
    if not torch.cuda.is_available():
        print("error: no CUDA device; `python -m benchmarks gpu` needs one", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT", readme.RESULTS))
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"])
    device = torch.device("cuda")
    operations(registry.CUDA_CASES, device, out / "ops-gpu.csv")
    run = Path("runs") / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}"
    words = ["--updates", str(_GPU_UPDATES), "--batch-size", "256", "--device", "cuda", "--out", str(run)]
    trained = subprocess.run([sys.executable, "-m", "models.train", *words])
    if trained.returncode == 0:
        training([run], out / "training-gpu.csv", device)
    return tests.returncode or trained.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure; results are CSV files.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cpu", help="time the operations on the CPU into benchmarks/results/ops-cpu.csv")
    commands.add_parser("gpu", help="test, time and train on a GPU; results under $OUT or benchmarks/results/")
    finished = commands.add_parser("train", help="collect finished CPU runs into benchmarks/results/training-cpu.csv")
    finished.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    commands.add_parser("readme-table", help="write the table of README.md from benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.command == "gpu":
        return gpu()
    cpu = torch.device("cpu")
    if arguments.command == "cpu":
        operations(registry.CPU_CASES, cpu, readme.RESULTS / "ops-cpu.csv")
    elif arguments.command == "train":
        training(arguments.runs, readme.RESULTS / "training-cpu.csv", cpu)
    else:
        path = readme.ROOT / "README.md"
        path.write_text(readme.updated(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything that wants a GPU in one call of under nine minutes: tests, benchmark, a training run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import results, run, training

# Seconds: together under nine minutes.
_TESTS, _BENCHMARK, _TRAINING = 240, 180, 90
_UPDATES = 2000


def main() -> int:
    """Results go under $OUT, or to benchmarks/results/; returns an exit status."""
    if not torch.cuda.is_available():
        print("error: no CUDA device; `python -m benchmarks gpu` needs one", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT", results.FOLDER))
    with tempfile.TemporaryDirectory() as site:
        bring_wheels(results.ROOT / ".whl", Path(site))
        build(results.ROOT)
        device = torch.device("cuda")
        outcomes = {
            "tests": _call(_TESTS, "-m", "pytest", "-q", "-m", "gpu", "tests"),
            "benchmark": run.standard(device, out / "gpu.csv", seconds=1.0, deadline=time.monotonic() + _BENCHMARK),
            "training": train(out, device),
        }
    print(", ".join(f"{name}: {'ok' if status == 0 else f'failed ({status})'}" for name, status in outcomes.items()))
    return max(outcomes.values())


def bring_wheels(folder: Path, site: Path) -> None:
    """Install the wheels of a folder, if there is one, for this process and its children."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        print(f"no wheels in {folder}: baselines that are not installed will be missing")
        return
    words = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), *wheels]
    subprocess.run([sys.executable, *words], check=True)
    sys.path.append(str(site))
    importlib.invalidate_caches()
    # After what the machine has itself.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(site)]))


def build(root: Path) -> None:
    """Build the C++ and CUDA library in place, where the checkout has one."""
    if (root / "csrc").is_dir():
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=root, check=True)


def train(out: Path, device: torch.device) -> int:
    """A training run of fixed length, its updates a second in training-gpu.csv."""
    folder = results.ROOT / "runs" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}"
    options = ["--data", training.images(), "--updates", str(_UPDATES), "--batch-size", "256", "--device", "cuda"]
    status = _call(_TRAINING, "-m", "models.train", *options, "--out", str(folder))
    if status == 0:
        results.write_training([folder], out / "training-gpu.csv", device)
    return status


def _call(seconds: float, *words: str) -> int:
    """Run Python; a child that takes too long is stopped and counts as failed."""
    try:
        return subprocess.run([sys.executable, *words], cwd=results.ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"error: {' '.join(words)} took more than {seconds} s", file=sys.stderr)
        return 124

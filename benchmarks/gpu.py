"""Everything that wants a GPU in one call of under ten minutes: tests, memory checks, benchmark, a training run."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import results, run, targets, training

# Seconds, together with what starts in between under ten minutes.
_TESTS, _SANITIZER, _BENCHMARK, _TRAINING, _TIMING = 200, 40, 110, 70, 110
# Tests that launch every kernel on small inputs: under the sanitizer everything is slow.
_SMALL = "(triton-cuda or native-cuda) and (by_hand or integers or told_apart)"
_UPDATES = 2000
# Enough to project all of the notebook's from.
_TIMED_UPDATES = 20_000


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
            "memcheck": sanitize("memcheck"),
            "racecheck": sanitize("racecheck"),
            "benchmark": run.standard(device, out / "gpu.csv", seconds=1.0, deadline=time.monotonic() + _BENCHMARK),
            "training": train(out, device),
            "updates": time_updates(out),
        }
    print(*targets.check(results.read(out / "gpu.csv"), "cuda"), sep="\n")
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


def sanitize(tool: str) -> int:
    """Small tests under a tool of compute-sanitizer, where there is one that takes this GPU."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print(f"{tool}: left out, there is no compute-sanitizer")
        return 0
    words = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu"]
    try:
        result = subprocess.run(
            [*words, "tests/functional", "-k", _SMALL],
            cwd=results.ROOT,
            # Without torch's cache each tensor is an allocation of its own, and one byte beyond it is seen.
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=_SANITIZER,
        )
    except subprocess.TimeoutExpired:
        print(f"error: {tool} took more than {_SANITIZER} s")
        return 124
    print(f"{tool}:", result.stdout[-3000:])
    if "Device not supported" in result.stdout:
        print(f"{tool}: left out, it does not take this device")
        return 0
    return result.returncode


def train(out: Path, device: torch.device) -> int:
    """A training run of fixed length, its updates a second in training-gpu.csv."""
    folder = results.ROOT / "runs" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}"
    options = ["--data", training.images(), "--updates", str(_UPDATES), "--batch-size", "256", "--device", "cuda"]
    status = _call(_TRAINING, "-m", "models.train", *options, "--out", str(folder))
    if status == 0:
        results.write_training([folder], out / "training-gpu.csv", device)
    return status


def time_updates(out: Path) -> int:
    """Updates a second of the notebook's training, ours and its own, in updates-cuda.csv."""
    words = ["--device", "cuda", "--updates", str(_TIMED_UPDATES), "--rounds", "1"]
    return _call(_TIMING, "-m", "benchmarks", "updates", *words, "--csv", str(out / "updates-cuda.csv"))


def _call(seconds: float, *words: str) -> int:
    """Run Python; a child that takes too long is stopped and counts as failed."""
    try:
        return subprocess.run([sys.executable, *words], cwd=results.ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"error: {' '.join(words)} took more than {seconds} s", file=sys.stderr)
        return 124

"""All GPU work in one call of less than ten minutes: tests, benchmark, training runs, memory checks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from . import results, targets, training

# The number of test processes that share the GPU: compilers take most of the time of the tests.
_PROCESSES = 8
# Small tests of the kernels alone, because the sanitizer is slow.
_SMALL = ("-m", "gpu and small", "-k", "triton-cuda or native-cuda")
_UPDATES = 2000
# The updates of `benchmarks updates`, and a smaller number if the step has less than this many seconds.
_TIMED_UPDATES, _FEW_UPDATES, _SHORT_STEP = 20_000, 4_000, 300
# The fraction of its time after which the benchmark begins no further case.
_LAST_BEGINS = 0.75


def main(seconds: float, only: list[str] | None = None) -> int:
    """Take all steps, or the steps `only`, within `seconds`. Returns an exit status.

    Results and the output of each step (STEP.log) go to $OUT, or to benchmarks/results/.
    """
    if not torch.cuda.is_available():
        print("error: `python -m benchmarks gpu` needs a CUDA device; torch finds none", file=sys.stderr)
        return 1
    end = time.monotonic() + seconds
    out = Path(os.environ.get("OUT", results.FOLDER))
    out.mkdir(parents=True, exist_ok=True)
    steps = [name for name in STEPS if only is None or name in only]
    with tempfile.TemporaryDirectory() as site:
        outcomes = {"wheels": install_wheels(results.ROOT / ".whl", Path(site)), "build": build(results.ROOT)}
        outcomes["CUDA C++"] = _cuda_kernels()
        for i, name in enumerate(steps):
            # Time that a step leaves is shared by the steps that follow.
            fraction = STEPS[name][0] / sum(STEPS[each][0] for each in steps[i:])
            outcomes[name] = STEPS[name][1](out, fraction * max(0.0, end - time.monotonic()))
    if "benchmark" in steps:
        # A stopped benchmark leaves a partial file, which is newer than a complete one.
        found = [path for path in (out / "gpu.partial", out / "gpu.csv") if path.exists()]
        print(*targets.check(results.read(found[0]) if found else [], "cuda"), sep="\n")
    print(", ".join(f"{name}: {'ok' if status == 0 else f'failed ({status})'}" for name, status in outcomes.items()))
    return int(any(outcomes.values()))


def install_wheels(folder: Path, site: Path) -> int:
    """Install the wheels of a folder, if it has any, for this process and its children. Returns an exit status."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        print(f"no wheels in {folder}: baselines that are not installed will be missing")
        return 0
    words = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), *wheels]
    status = subprocess.run([sys.executable, *words]).returncode
    sys.path.append(str(site))
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(site)]))
    return status


def build(root: Path) -> int:
    """Build the C++ and CUDA library in place if the checkout has its sources. Returns an exit status."""
    if not (root / "csrc").is_dir():
        return 0
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=root).returncode


def _cuda_kernels() -> int:
    """Fail if the CUDA C++ kernels are unavailable, because their tests and times would be skipped."""
    code = "from dlvae_kernels.backends.native import cuda_unavailable_reason as reason; print(reason() or '')"
    found = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, capture_output=True, text=True)
    reason = (found.stdout + found.stderr).strip()
    print(f"CUDA C++ kernels are unavailable: {reason}" if reason else "CUDA C++ kernels are available")
    return int(bool(reason))


def _test(out: Path, seconds: float) -> int:
    parallel = ["-n", str(_PROCESSES)] if importlib.util.find_spec("xdist") else []
    return _call_module(out / "tests.log", seconds, "pytest", *parallel, "-m", "gpu", "tests")


def _benchmark(out: Path, seconds: float) -> int:
    words = ["--device", "cuda", "--seconds", "1", "--within", str(_LAST_BEGINS * seconds)]
    words += ["--csv", str(out / "gpu.csv")]
    return _call_module(out / "benchmark.log", seconds, "benchmarks", "standard", *words)


def _train(out: Path, seconds: float) -> int:
    """A training run of fixed length, with its summary in training-gpu.csv."""
    folder = results.ROOT / "runs" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}"
    words = ["--data", training.images(), "--updates", str(_UPDATES), "--batch-size", "256", "--device", "cuda"]
    status = _call_module(out / "training.log", seconds, "models.train", *words, "--out", str(folder))
    if status == 0:
        results.write_training([folder], out / "training-gpu.csv", torch.device("cuda"))
    return status


def _time_updates(out: Path, seconds: float) -> int:
    """Times of the training updates of this library and of the VQ-VAE notebook, in updates-cuda.csv."""
    count = _TIMED_UPDATES if seconds >= _SHORT_STEP else _FEW_UPDATES
    words = ["--device", "cuda", "--updates", str(count), "--rounds", "1", "--csv", str(out / "updates-cuda.csv")]
    return _call_module(out / "updates.log", seconds, "benchmarks", "updates", *words)


def _sanitize(tool: str, out: Path, seconds: float) -> int:
    """Run small tests under a tool of compute-sanitizer, if it is installed and supports the GPU."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print(f"{tool}: left out, because compute-sanitizer is not installed")
        return 0
    log = out / f"{tool}.log"
    # Without torch's cache each tensor is an allocation of its own, and any access beyond it is reported.
    words = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, "--tool", tool, "--error-exitcode", "9"]
    words += [sys.executable, "-m", "pytest", "-x", "tests/functional", *_SMALL]
    status = call(log, seconds, *words)
    if "Device not supported" in log.read_text(errors="replace"):
        print(f"{tool}: left out, because it does not support the device")
        return 0
    return status


# The steps in their order: the weight of each in sharing the time, and its function of a folder and seconds.
STEPS: dict[str, tuple[int, Callable[[Path, float], int]]] = {
    "tests": (190, _test),
    "benchmark": (140, _benchmark),
    "training": (40, _train),
    "updates": (100, _time_updates),
    "memcheck": (40, partial(_sanitize, "memcheck")),
    "racecheck": (40, partial(_sanitize, "racecheck")),
}


def _call_module(log: Path, seconds: float, module: str, *words: str) -> int:
    return call(log, seconds, sys.executable, "-m", module, *words)


def call(log: Path, seconds: float, *words: str) -> int:
    """Run a program with its output in a file, and print the end of the file. Returns an exit status.

    A program that exceeds the time is interrupted with its children, and killed ten seconds later; the status is 124.
    """
    limit = ["timeout", "--signal=INT", "--kill-after=10", str(max(1.0, seconds))]
    with log.open("wb") as file:
        status = subprocess.run([*limit, *words], cwd=results.ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    print(f"--- {log.stem}{f': exceeded {seconds:.0f} s' if status == 124 else ''}")
    print(log.read_text(errors="replace")[-1500:], flush=True)
    return status

"""Everything that wants a GPU in one call of under ten minutes: tests, benchmark, training runs, memory checks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from . import results, targets, training

# Processes that share the GPU: most of the time of the tests is that of compilers.
_PROCESSES = 8
# Tests that launch every kernel on small inputs: under the sanitizer everything is slow.
_SMALL = "(triton-cuda or native-cuda) and (by_hand or integers or told_apart)"
_UPDATES = 2000
# Enough to project all of the notebook's from; and fewer, where there is little time for them.
_TIMED_UPDATES, _FEW_UPDATES, _LITTLE_TIME = 20_000, 4_000, 300
# Of the time of the benchmark: another case begins no later.
_LAST_BEGINS = 0.75


def main(seconds: float, only: list[str] | None = None) -> int:
    """Take the steps, or `only` some, within `seconds`; returns an exit status.

    Results and the output of each step (STEP.log) go under $OUT, or to benchmarks/results/.
    """
    if not torch.cuda.is_available():
        print("error: no CUDA device; `python -m benchmarks gpu` needs one", file=sys.stderr)
        return 1
    end = time.monotonic() + seconds
    out = Path(os.environ.get("OUT", results.FOLDER))
    out.mkdir(parents=True, exist_ok=True)
    steps = [name for name in STEPS if only is None or name in only]
    with tempfile.TemporaryDirectory() as site:
        outcomes = {"wheels": bring_wheels(results.ROOT / ".whl", Path(site)), "build": build(results.ROOT)}
        outcomes["CUDA C++"] = _cuda_kernels()
        for i, name in enumerate(steps):
            # What a step leaves of its time goes to those that follow.
            share = STEPS[name][0] / sum(STEPS[each][0] for each in steps[i:])
            outcomes[name] = STEPS[name][1](out, share * max(0.0, end - time.monotonic()))
    if "benchmark" in steps:
        # A benchmark that was stopped leaves its rows so far, beside those of an earlier one.
        found = [path for path in (out / "gpu.partial", out / "gpu.csv") if path.exists()]
        print(*targets.check(results.read(found[0]) if found else [], "cuda"), sep="\n")
    print(", ".join(f"{name}: {'ok' if status == 0 else f'failed ({status})'}" for name, status in outcomes.items()))
    return int(any(outcomes.values()))


def bring_wheels(folder: Path, site: Path) -> int:
    """Install the wheels of a folder, if there is one, for this process and its children; returns an exit status."""
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
    """Build the C++ and CUDA library in place, where the checkout has one; returns an exit status."""
    if not (root / "csrc").is_dir():
        return 0
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=root).returncode


def _cuda_kernels() -> int:
    """Whether the kernels in CUDA C++ are there: without them nothing of theirs is tested, nor timed."""
    code = "from dlvae_kernels.backends.native import cuda_unavailable_reason as reason; print(reason() or '')"
    found = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, capture_output=True, text=True)
    reason = (found.stdout + found.stderr).strip()
    print(f"no kernels in CUDA C++: {reason}" if reason else "kernels in CUDA C++ are there")
    return int(bool(reason))


def _test(out: Path, seconds: float) -> int:
    parallel = ["-n", str(_PROCESSES)] if importlib.util.find_spec("xdist") else []
    return call(out / "tests.log", seconds, sys.executable, "-m", "pytest", *parallel, "-m", "gpu", "tests")


def _benchmark(out: Path, seconds: float) -> int:
    words = ["--device", "cuda", "--seconds", "1", "--within", str(_LAST_BEGINS * seconds)]
    program = [sys.executable, "-m", "benchmarks", "standard"]
    return call(out / "benchmark.log", seconds, *program, *words, "--csv", str(out / "gpu.csv"))


def _train(out: Path, seconds: float) -> int:
    """A training run of fixed length, its updates a second in training-gpu.csv."""
    folder = results.ROOT / "runs" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}"
    words = ["--data", training.images(), "--updates", str(_UPDATES), "--batch-size", "256", "--device", "cuda"]
    program = [sys.executable, "-m", "models.train"]
    status = call(out / "training.log", seconds, *program, *words, "--out", str(folder))
    if status == 0:
        results.write_training([folder], out / "training-gpu.csv", torch.device("cuda"))
    return status


def _time_updates(out: Path, seconds: float) -> int:
    """Updates a second of the notebook's training, ours and its own, in updates-cuda.csv."""
    count = _TIMED_UPDATES if seconds >= _LITTLE_TIME else _FEW_UPDATES
    words = ["--device", "cuda", "--updates", str(count), "--rounds", "1", "--csv", str(out / "updates-cuda.csv")]
    return call(out / "updates.log", seconds, sys.executable, "-m", "benchmarks", "updates", *words)


def _sanitize(tool: str, out: Path, seconds: float) -> int:
    """Small tests under a tool of compute-sanitizer, where there is one that takes this GPU."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print(f"{tool}: left out, there is no compute-sanitizer")
        return 0
    log = out / f"{tool}.log"
    # Without torch's cache each tensor is an allocation of its own, and one byte beyond it is seen.
    words = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, "--tool", tool, "--error-exitcode", "9"]
    words += [sys.executable, "-m", "pytest", "-x", "-m", "gpu", "tests/functional", "-k", _SMALL]
    status = call(log, seconds, *words)
    if "Device not supported" in log.read_text(errors="replace"):
        print(f"{tool}: left out, it does not take this device")
        return 0
    return status


# In their order: the share of the time that each may take, and what it does with a folder and seconds.
STEPS: dict[str, tuple[int, Callable[[Path, float], int]]] = {
    "tests": (190, _test),
    "benchmark": (140, _benchmark),
    "training": (40, _train),
    "updates": (100, _time_updates),
    "memcheck": (40, partial(_sanitize, "memcheck")),
    "racecheck": (40, partial(_sanitize, "racecheck")),
}


def call(log: Path, seconds: float, *words: str) -> int:
    """Run a program with its output in a file, of which the end is printed; returns an exit status.

    One that takes too long is interrupted with all that it started, then killed: 124.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, cwd=results.ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = 124
            os.killpg(process.pid, signal.SIGINT)
            # Long enough to tell what was found.
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(f"--- {log.stem}{f': took more than {seconds:.0f} s' if status == 124 else ''}")
    print(log.read_text(errors="replace")[-1500:], flush=True)
    return status

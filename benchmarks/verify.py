"""Whether a change made an operation faster: its tests first, then this tree against another commit, in turns."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import gpu, measure, results
from .entry import Entry, Size

_ROUNDS = 15
# Medians that differ by less are not called different, however even the rounds are.
_LEAST_CHANGE = 0.03


class RefusedError(Exception):
    """No time counts: the message says what is wrong with this tree."""


def verify(entry: Entry, sizes: list[Size], base: str, device: torch.device) -> list[str]:
    """Time ours in this tree, uncommitted changes included, against commit `base`: a line for each size and pass.

    Raises:
        RefusedError: a test of the operation fails, or an answer at these sizes is wrong.
        ValueError: there is no such commit.
    """
    if _test(entry) != 0:
        raise RefusedError(f"{entry.tests} fails: a time on a red test is worth nothing")
    with _worktree(base) as other, _Worker(results.ROOT, entry, sizes, device) as new:
        if new.wrong:
            raise RefusedError(f"the answer of {entry.name} is wrong at {', '.join(new.wrong)}")
        with _Worker(other, entry, sizes, device) as old:
            rounds = []
            for number in range(_ROUNDS):
                # Taking turns at going first.
                pair = {worker: worker.round() for worker in ((new, old) if number % 2 else (old, new))}
                rounds.append((pair[old], pair[new]))
    return [_line(name, [(before[name], after[name]) for before, after in rounds]) for name in rounds[0][0]]


def _test(entry: Entry) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", entry.tests], cwd=results.ROOT).returncode


def _line(name: str, pairs: list[tuple[float, float]]) -> str:
    ratios = [before / after for before, after in pairs]
    low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
    middle = statistics.median(ratios)
    if low > 1 and middle > 1 + _LEAST_CHANGE:
        outcome = "faster"
    elif high < 1 and middle < 1 - _LEAST_CHANGE:
        outcome = "SLOWER"
    else:
        outcome = "no difference"
    before, after = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    return f"{name}: {before:.4g} ms -> {after:.4g} ms, {middle:.2f}x ({low:.2f} to {high:.2f}): {outcome}"


@contextmanager
def _worktree(base: str) -> Iterator[Path]:
    """A throwaway checkout of a commit, with the benchmark of this tree."""
    folder = Path(tempfile.mkdtemp(prefix="dlvae-base-")) / "tree"
    words = ["git", "worktree", "add", "--quiet", "--detach", str(folder), base]
    made = subprocess.run(words, cwd=results.ROOT, capture_output=True, text=True)
    try:
        if made.returncode != 0:
            raise ValueError(f"base is {base!r}; it needs to be a commit: {made.stderr.strip()}")
        shutil.copytree(results.ROOT / "benchmarks", folder / "benchmarks", dirs_exist_ok=True)
        if gpu.build(folder) != 0:
            raise ValueError(f"base is {base!r}, whose csrc cannot be built here")
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=results.ROOT, capture_output=True)
        shutil.rmtree(folder.parent, ignore_errors=True)


class _Worker:
    """A process that times the package of one tree, a round whenever it is asked."""

    def __init__(self, tree: Path, entry: Entry, sizes: list[Size], device: torch.device) -> None:
        job = {"op": entry.name, "device": device.type, "sizes": [_packed(size) for size in sizes]}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.verify", json.dumps(job)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self._read()
        if Path(ready["package"]).parents[1] != tree.resolve():
            raise RuntimeError(f"the worker of {tree} imports {ready['package']}")
        self.wrong: list[str] = ready["wrong"]

    def round(self) -> dict[str, float]:
        """Seconds of each size and pass."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}; its error stands above")
        return json.loads(line)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


def _packed(size: Size) -> list:
    return [size.workload, size.n, size.k, size.d, size.kept, size.precision]


def _unpacked(values: list) -> Size:
    workload, n, k, d, kept, precision = values
    return Size(workload, n, k, d, kept, getattr(torch, precision))


def _serve(job: dict) -> None:
    import dlvae_kernels

    from .registry import ENTRIES

    entry, device = ENTRIES[job["op"]], torch.device(job["device"])
    sizes = [_unpacked(each) for each in job["sizes"]]
    ours = {str(size): measure.ours(entry, size, device) for size in sizes}
    wrong = [name for name, result in ours.items() if result.verdict is not None and result.verdict.wrong]
    print(json.dumps({"package": dlvae_kernels.__file__, "wrong": wrong}), flush=True)
    for _ in sys.stdin:
        found = {}
        for name, result in ours.items():
            for part, seconds in measure.sample(result, device).items():
                found[f"{name}, {part}"] = seconds
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))

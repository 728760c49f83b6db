"""Verify a change: run the tests of an operation, then time this tree and another commit in turns."""

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
from typing import Any

import torch

from . import gpu, measure, results, run
from .entry import Entry
from .inputs import draw

_ROUNDS = 15
# A smaller change of the median is not called a difference.
_MIN_CHANGE = 0.03


class RefusedError(Exception):
    """A time would not be valid; the message states what is wrong with this tree."""


def verify(op: str, sizes: list[str] | None, base: str, device: torch.device) -> list[str]:
    """Time this library in this tree, with uncommitted changes, and in commit `base`: a line for each size and pass.

    Raises:
        RefusedError: a test of the operation fails, or an answer at these sizes is wrong.
        ValueError: the operation, a size or the commit does not exist.
    """
    entry = run.select([op], sizes, device)[0][0]
    if _test(entry) != 0:
        raise RefusedError(f"{entry.tests} fails; a time without passing tests is not valid")
    with _worktree(base) as other, _worker(results.ROOT, op, sizes, device) as new:
        if wrong := _ask(new)["wrong"]:
            raise RefusedError(f"the answer of {op} is wrong at {', '.join(wrong)}")
        with _worker(other, op, sizes, device) as old:
            _ask(old)
            rounds = []
            for number in range(_ROUNDS):
                pair = {worker: _ask(worker) for worker in ((new, old) if number % 2 else (old, new))}
                rounds.append((pair[old], pair[new]))
    return [_line(name, [(before[name], after[name]) for before, after in rounds]) for name in rounds[0][0]]


def _test(entry: Entry) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", entry.tests], cwd=results.ROOT).returncode


def _line(name: str, pairs: list[tuple[float, float]]) -> str:
    ratios = [before / after for before, after in pairs]
    low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
    middle = statistics.median(ratios)
    if low > 1 and middle > 1 + _MIN_CHANGE:
        outcome = "faster"
    elif high < 1 and middle < 1 - _MIN_CHANGE:
        outcome = "SLOWER"
    else:
        outcome = "no difference"
    before, after = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    return f"{name}: {before:.4g} ms -> {after:.4g} ms, {middle:.2f}x ({low:.2f} to {high:.2f}): {outcome}"


@contextmanager
def _worktree(base: str) -> Iterator[Path]:
    """A temporary checkout of a commit, with the benchmarks of this tree."""
    folder = Path(tempfile.mkdtemp(prefix="dlvae-base-")) / "tree"
    words = ["git", "worktree", "add", "--quiet", "--detach", str(folder), base]
    made = subprocess.run(words, cwd=results.ROOT, capture_output=True, text=True)
    try:
        if made.returncode != 0:
            raise ValueError(f"expected base to be a commit, got {base!r}: {made.stderr.strip()}")
        for name in ("benchmarks", "tests/oracles"):
            shutil.copytree(results.ROOT / name, folder / name, dirs_exist_ok=True)
        if gpu.build(folder) != 0:
            raise ValueError(f"expected base to be a commit whose csrc can be built here, got {base!r}")
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=results.ROOT, capture_output=True)
        shutil.rmtree(folder.parent, ignore_errors=True)


def _worker(tree: Path, op: str, sizes: list[str] | None, device: torch.device) -> subprocess.Popen[str]:
    """A process that times the package of one tree. It ends when its input is closed."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.verify", json.dumps([op, sizes, device.type])],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """The next answer of a worker: first the sizes at which it is wrong, then the seconds of each size and pass."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker ended with status {worker.wait()}; its error is printed above")
    return json.loads(line)


def _answers(op: str, texts: list[str] | None, device_type: str) -> Iterator[dict[str, Any]]:
    import dlvae_kernels

    if Path(dlvae_kernels.__file__).parents[1] != Path.cwd().resolve():
        raise RuntimeError(f"the worker of {Path.cwd()} imports {dlvae_kernels.__file__}")
    device = torch.device(device_type)
    cases = [case for case in run.select([op], texts, device) if texts or case[1].workload != "growth"]
    prepared = {
        str(size): measure.prepare(entry, entry.implementations[0], draw(size, device, unit=entry.unit))
        for entry, size in cases
    }
    yield {"wrong": [name for name, each in prepared.items() if each.verdict is None or each.verdict.wrong]}
    while True:
        samples = {name: measure.sample(result, device) for name, result in prepared.items()}
        yield {f"{name}, {key}": seconds for name, found in samples.items() for key, seconds in found.items()}


if __name__ == "__main__":
    for _, answer in zip(sys.stdin, _answers(*json.loads(sys.argv[1])), strict=False):
        print(json.dumps(answer), flush=True)

"""`pytest benchmarks`: the registry through pytest-benchmark, for its statistics and its comparisons between runs.

Implementations are not interleaved here. The published results come from `python -m benchmarks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import measure
from .entry import Entry, Implementation, Size
from .registry import ENTRIES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_ROUNDS = 7
CASES = [
    pytest.param(entry, size, each, id=f"{entry.name}-{size.workload}-{size.precision}-{each.name}")
    for entry in ENTRIES.values()
    for size in entry.sizes[DEVICE.type]
    if size.workload != "growth"
    for each in entry.implementations
]


@functools.lru_cache(maxsize=1)
def _result(entry: Entry, size: Size, implementation: Implementation) -> measure.Result:
    result = measure.prepare(entry, implementation, measure.input_sets(entry, size, DEVICE))
    if result.verdict is not None and implementation is entry.implementations[0]:
        assert not result.verdict.wrong, f"the answer of this library has the error {result.verdict.error:.2g}"
    return result


def _synchronized(function: Callable[..., Any]) -> Callable[..., Any]:
    """On a GPU a call ends when the device has finished."""

    def run(*args: Any) -> Any:
        out = function(*args)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        return out

    return run


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize(("entry", "size", "implementation"), CASES)
def test_speed(benchmark: Any, entry: Entry, size: Size, implementation: Implementation, name: str) -> None:
    result = _result(entry, size, implementation)
    if result.verdict is None:
        pytest.skip(result.reason or "")
    call = result.calls[0]
    benchmark.group = f"{entry.name} {name}, {size.workload}: {size}"
    benchmark.extra_info |= {"wrong": result.verdict.wrong, "error": result.verdict.error}
    forward = _synchronized(call.forward)
    if name == "forward":
        benchmark.pedantic(forward, rounds=_ROUNDS, iterations=result.repeats, warmup_rounds=1)
    elif call.backward is None:
        pytest.skip("the operation has no backward pass")
    else:
        benchmark.pedantic(_synchronized(call.backward), setup=lambda: ((forward(),), {}), rounds=_ROUNDS)

"""`pytest benchmarks`: the registry through pytest-benchmark, for its statistics and its comparisons between runs.

Implementations are not interleaved here. The published results come from `python -m benchmarks`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from . import measure
from .entry import Entry, Implementation
from .inputs import Size, draw
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
    return measure.prepare(entry, implementation, draw(size, DEVICE, unit=entry.unit))


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize(("entry", "size", "implementation"), CASES)
def test_speed(benchmark: Any, entry: Entry, size: Size, implementation: Implementation, name: str) -> None:
    result = _result(entry, size, implementation)
    if result.verdict is None or result.call is None:
        pytest.skip(result.reason or "")
    if name not in result.call.passes:
        pytest.skip("the operation has no backward pass")
    assert not (result.verdict.wrong and implementation is entry.implementations[0])
    forward, backward = result.call.forward, result.call.backward
    benchmark.group = f"{entry.name} {name}, {size.workload}: {size}"
    benchmark.extra_info |= result.verdict.cells()

    def run(*out: Any) -> None:
        # On a GPU a call ends when the device has finished.
        backward(*out) if backward and out else forward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (forward(),) if name == "backward" else (), {}

    benchmark.pedantic(run, setup=setup, rounds=_ROUNDS, warmup_rounds=1)

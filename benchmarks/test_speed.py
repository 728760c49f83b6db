"""`pytest benchmarks`: the registry through pytest-benchmark, for its statistics and its comparisons between runs.

Contenders are not interleaved here; the figures that we publish come from `python -m benchmarks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import measure
from .entry import Contender, Entry, Size
from .registry import ENTRIES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_ROUNDS = 7
CASES = [
    pytest.param(entry, size, contender, id=f"{entry.name}-{size.workload}-{size.precision}-{contender.name}")
    for entry in ENTRIES.values()
    for size in entry.sizes[DEVICE.type]
    if size.workload != "growth"
    for contender in entry.contenders
]


@functools.lru_cache(maxsize=1)
def _result(entry: Entry, size: Size, contender: Contender) -> measure.Result:
    result = measure.prepare(entry, contender, measure.input_sets(entry, size, DEVICE))
    if result.verdict is not None and contender is entry.contenders[0]:
        assert not result.verdict.wrong, f"our answer errs by {result.verdict.error:.2g}"
    return result


def _finished(function: Callable[..., Any]) -> Callable[..., Any]:
    """On a GPU a call counts until the device is done."""

    def run(*args: Any) -> Any:
        out = function(*args)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        return out

    return run


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize(("entry", "size", "contender"), CASES)
def test_speed(benchmark: Any, entry: Entry, size: Size, contender: Contender, name: str) -> None:
    result = _result(entry, size, contender)
    if result.reason is not None or result.verdict is None:
        pytest.skip(result.reason or "")
    call = result.calls[0]
    benchmark.group = f"{entry.name} {name}, {size.workload}: {size}"
    benchmark.extra_info |= {"wrong": result.verdict.wrong, "error": result.verdict.error}
    if name == "forward":
        benchmark.pedantic(_finished(call.forward), rounds=_ROUNDS, iterations=result.repeats, warmup_rounds=1)
    elif call.backward is None:
        pytest.skip("it has no backward")
    else:
        forward = _finished(call.forward)
        benchmark.pedantic(_finished(call.backward), setup=lambda: ((forward(),), {}), rounds=_ROUNDS)

"""The measuring harness: implementations are warmed up, judged, and timed in turns in one process.

On a GPU, `triton.testing.do_bench` serves for the ceilings only, which are one kernel each: it does not hide the time
that the host needs to launch the several kernels of a layer, and it does not take turns.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from dlvae_kernels.backends import BackendUnavailable, choose, use_backend

from .calls import Call, MissingError
from .ceilings import Ceilings
from .entry import Entry, Implementation, Verdict
from .inputs import Inputs, Size, draw
from .memory import peak_on_cpu, peak_on_cuda

# On the CPU a sample repeats a short call until it lasts this long, far above the resolution of the clock.
_MIN_SAMPLE = 2e-3  # seconds
_MIN_ROUNDS, _MAX_ROUNDS = 5, 41
# A call that lasts this long needs no second one to warm up. If a round lasts longer, fewer rounds are enough.
_SLOW, _SLOW_ROUND, _SLOW_ROUNDS = 1.0, 10.0, 3  # seconds, seconds, rounds
# On a GPU each call finds the L2 cache overwritten.
_FLUSH_BYTES = 256 * 2**20
# The GPU first waits for about a millisecond: the host needs longer to launch several kernels than the GPU to run one.
_WAIT_CYCLES = 2_000_000
# Parameters of mallopt, from malloc.h.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


@dataclass
class Result:
    """The measurements of one implementation: the reason if it did not run, else verdict, times and peak memory."""

    implementation: Implementation
    backend: str = ""  # the backend of this library
    reason: str | None = None
    verdict: Verdict | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by pass, a value for each round
    megabytes: dict[str, float] = field(default_factory=dict)  # by pass
    call: Call | None = None
    repeats: int = 1  # calls in a sample
    duration: float = 0.0  # of a sample, in seconds


def race(
    entry: Entry,
    size: Size,
    device: torch.device,
    *,
    names: Sequence[str] | None = None,
    backend: str | None = None,
    seconds: float = 6.0,
    memory: bool = True,
) -> list[Result]:
    """Judge and time the implementations of an entry at a size. This library is always included.

    Args:
        names: the baselines; None: all.
        backend: the backend that this library is forced to use; None: its own choice.
        seconds: the approximate duration of timing; slow implementations still run a few rounds.
    """
    chosen = [each for i, each in enumerate(entry.implementations) if i == 0 or names is None or each.name in names]
    with use_backend(backend) if backend else nullcontext():
        inputs = draw(size, device, unit=entry.unit)
        results = [prepare(entry, each, inputs) for each in chosen]
        results[0].backend = _backend_of(entry, device)
        _time([each for each in results if each.call], device, seconds)
        for result in results:
            if memory and result.call:
                result.megabytes = (
                    peak_on_cuda(result.call, device)
                    if device.type == "cuda"
                    else peak_on_cpu(entry, size, result.implementation, backend)
                )
            result.call = None
    if device.type == "cuda":
        # The next size may need the memory that the allocator has cached.
        torch.cuda.empty_cache()
    return results


@lru_cache
def keep_freed_memory() -> None:
    """Make the process keep freed memory.

    By default glibc returns some of it to the system, depending on earlier allocations. The page faults of allocating
    it again then dominate operations that store N x K values, and two runs differ by factors.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**30)


def prepare(entry: Entry, implementation: Implementation, inputs: Inputs) -> Result:
    """Prepare an implementation, judge its answer and choose how often a sample repeats the call.

    An exception becomes the result's reason.
    """
    keep_freed_memory()
    result = Result(implementation)
    try:
        call = implementation.prepare(inputs)
        judge = implementation.judge or entry.judge
        begin = time.perf_counter()
        judged = call.judged()
        result.call, result.duration = call, time.perf_counter() - begin
        result.verdict = judge(inputs, *judged, implementation.tolerance_at(inputs.size))
        if result.duration < _SLOW or inputs.x.device.type == "cuda":
            begin = time.perf_counter()
            result.repeats = max(1, round(_MIN_SAMPLE / max(sample(result, inputs.x.device)["forward"], 1e-7)))
            result.duration = max(time.perf_counter() - begin, _MIN_SAMPLE)
    except MissingError as error:
        result.reason = f"missing: {error}"
    except BackendUnavailable:
        raise
    except Exception as error:
        # A library may raise any exception. The row of this library states its exception too, and the run continues.
        if implementation is entry.implementations[0]:
            traceback.print_exc()
        first_line = str(error).strip().partition("\n")[0][:200]
        result.reason = f"failed: {type(error).__name__}: {first_line}"
        result.call = result.verdict = None
    return result


def _time(results: list[Result], device: torch.device, budget: float) -> None:
    if not results:
        return
    gc.collect()
    gc.disable()
    try:
        duration = sum(result.duration for result in results)
        least = _MIN_ROUNDS if duration < _SLOW_ROUND else _SLOW_ROUNDS
        for number in range(max(least, min(_MAX_ROUNDS, int(budget / duration)))):
            # Each round begins with another implementation, so that none always follows the same one.
            first = number % len(results)
            for result in results[first:] + results[:first]:
                for name, value in sample(result, device).items():
                    result.seconds.setdefault(name, []).append(value)
    finally:
        gc.enable()


def sample(result: Result, device: torch.device) -> dict[str, float]:
    """One time of each pass in seconds."""
    call, repeats = result.call, result.repeats
    assert call is not None
    time_call = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    out, seconds = time_call(call.forward, repeats)
    found = {"forward": seconds}
    if backward := call.backward:
        _, found["backward"] = time_call(lambda: backward(out), 1)
    return found


def _cpu_seconds(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    begin = time.perf_counter()
    for _ in range(repeats):
        out = run()
    return out, (time.perf_counter() - begin) / repeats


def _cuda_seconds(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result of a call and its time between two events; the GPU is busy while the host launches the call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer().zero_()
    torch.cuda._sleep(_WAIT_CYCLES)
    begin.record()
    out = run()
    end.record()
    torch.cuda.synchronize()
    return out, begin.elapsed_time(end) * 1e-3


@lru_cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def rows(results: list[Result], entry: Entry, size: Size, ceilings: Ceilings) -> list[dict[str, Any]]:
    """A row for each implementation and pass, without device, versions and commit."""
    table = []
    library = results[0].seconds
    for result in results:
        precision = result.implementation.precision_at(size)
        common = {
            "op": entry.name,
            "workload": size.workload,
            "size": str(size),
            "implementation": result.implementation.name,
            "backend": result.backend,
            "precision": precision,
            "package": result.implementation.package,
        }
        if result.verdict is None:
            table.append({**common, "pass": "forward", "status": result.reason})
            continue
        for name, seconds in result.seconds.items():
            row = {**common, "pass": name, **spread("ms", [1e3 * each for each in seconds], ".4g")}
            if name in library:
                # Ratios are taken within a round, so that a slow round changes both of its times.
                pairs = zip(seconds, library[name], strict=True)
                row |= spread("ratio", [baseline / own for baseline, own in pairs], ".3f")
            if name in entry.work:
                limit = ceilings.seconds(entry.work[name], size, precision)
                row["limit_percent"] = f"{100 * limit / statistics.median(seconds):.3g}"
            if name in result.megabytes:
                row["peak_mb"] = f"{result.megabytes[name]:.1f}"
            if result.verdict.differing is not None:
                row["differing"] = f"{result.verdict.differing:.2g}"
            table.append({**row, **result.verdict.cells()})
    return table


def _backend_of(entry: Entry, device: torch.device) -> str:
    """The backends that this library uses for the entry."""
    probe = torch.empty(0, device=device)
    modules = [choose(op, probe).__module__ for op in entry.ops]
    # Compiled operations are objects of torch.
    names = [name.split(".")[2] if name.startswith("dlvae_kernels.") else "native" for name in modules]
    return "+".join(dict.fromkeys(names))


def spread(name: str, values: list[float], form: str) -> dict[str, str]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    found = {name: statistics.median(values), f"{name}_p20": cuts[0], f"{name}_p80": cuts[3]}
    return {key: format(value, form) for key, value in found.items()}

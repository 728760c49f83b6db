"""Timing of contenders against each other: warmed up, interleaved in one process, judged before they are timed."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from dlvae_kernels.backends import BackendUnavailable, choose, use_backend

from .ceilings import Ceilings
from .entry import TOLERANCES, Call, Contender, Entry, Inputs, MissingError, Size, Verdict, draw
from .memory import peak_on_cpu, peak_on_cuda

# A sample on the CPU repeats a short call until it lasts this long, far over the resolution of the clock.
_LEAST_SAMPLE = 2e-3  # seconds
_MOST_REPEATS = 50
_ROUNDS = (5, 41)  # at least and at most
# On a GPU each call finds the L2 cache overwritten, and other inputs than the call before it.
_FLUSH_BYTES = 256 * 2**20
# A call of several kernels takes the host longer than one of them the GPU: it first waits for about a millisecond.
_QUEUED_IN = 2_000_000  # cycles
_INPUT_SETS = {"cpu": 1, "cuda": 3}
_MOST_INPUT_BYTES = 16 * 2**30
# From malloc.h.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


@dataclass
class Result:
    """What was found of one contender: why it did not run, or its verdict, times and peak memory by pass."""

    contender: Contender
    backend: str = ""  # that ours ran on
    reason: str | None = None
    verdict: Verdict | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    repeats: int = 1


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
    """Judge and time the contenders of an entry at a size, ours always among them.

    Args:
        names: baselines to take; None: all.
        backend: force ours onto it; None: what it chooses.
        seconds: about how long to time; slow contenders still get a few rounds.
    """
    chosen = [each for i, each in enumerate(entry.contenders) if i == 0 or names is None or each.name in names]
    with use_backend(backend) if backend else nullcontext():
        inputs = input_sets(entry, size, device)
        results = [prepare(entry, each, inputs) for each in chosen]
        results[0].backend = _backend_of(entry, device)
        _time([each for each in results if each.reason is None], device, seconds)
        for result in results:
            if memory and result.reason is None:
                if device.type == "cuda":
                    result.megabytes = peak_on_cuda(result.calls[0], device)
                else:
                    result.megabytes = peak_on_cpu(entry, size, result.contender, backend)
            result.calls.clear()
    if device.type == "cuda":
        # What one size leaves in the allocator is not missing at the next.
        torch.cuda.empty_cache()
    return results


@lru_cache
def _keep_freed_memory() -> None:
    """Let freed memory stay with this process.

    By default glibc gives some of it back, depending on what ran before, and the page faults of getting it again then
    take much of the time of an operation that stores N x K: two runs would differ by factors.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**30)


def input_sets(entry: Entry, size: Size, device: torch.device) -> list[Inputs]:
    _keep_freed_memory()
    first = draw(size, device, unit=entry.unit)
    taken = sum(each.nbytes for each in (first.x, first.codes, first.indices, first.values, first.grad))
    fit = max(1, min(_INPUT_SETS[device.type], _MOST_INPUT_BYTES // max(1, taken)))
    return [first, *(draw(size, device, seed, entry.unit) for seed in range(1, fit))]


def prepare(entry: Entry, contender: Contender, inputs: list[Inputs]) -> Result:
    """Prepare a contender, warm it up and judge its first answer; what it raises becomes its reason."""
    result = Result(contender)
    try:
        result.calls = [contender.prepare(each) for each in inputs]
        call, size = result.calls[0], inputs[0].size
        out = call.forward()
        answer = call.answer(out)
        gradients = call.backward(out) if call.backward else None
        precision = contender.precision_at(size)
        judge = contender.judge or entry.judge
        result.verdict = judge(inputs[0], answer, gradients, TOLERANCES["float32" if contender.exact else precision])
        for other in result.calls[1:]:
            other.run(other.passes[-1])
    except MissingError as error:
        result.reason = f"missing: {error}"
    except Exception as error:
        # Another library may raise anything; where ours does, its row says so too, and the run goes on.
        if isinstance(error, BackendUnavailable):
            raise
        if contender is entry.contenders[0]:
            traceback.print_exc()
        result.reason = (
            f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
        )
        result.calls = []
    return result


def _time(results: list[Result], device: torch.device, budget: float) -> None:
    if not results:
        return
    with _quiet():
        begin = time.perf_counter()
        for result in results:
            _calibrate(result, device)
        # The slowest has not been repeated: a round lasts about as long as this first one did.
        least, most = _ROUNDS
        lasts = max(time.perf_counter() - begin, _LEAST_SAMPLE * len(results))
        for number in range(max(least, min(most, int(budget / lasts)))):
            # Another begins each round, so that no one always follows the same one.
            first = number % len(results)
            for result in results[first:] + results[:first]:
                for name, value in sample(result, device, number).items():
                    result.seconds.setdefault(name, []).append(value)


def ours(entry: Entry, size: Size, device: torch.device) -> Result:
    """Our contender alone, judged and ready for `sample`."""
    result = prepare(entry, entry.contenders[0], input_sets(entry, size, device))
    _calibrate(result, device)
    return result


def _calibrate(result: Result, device: torch.device) -> None:
    """How often a sample has to repeat the call."""
    first = sample(result, device)["forward"]
    result.repeats = max(1, min(_MOST_REPEATS, round(_LEAST_SAMPLE / max(first, 1e-9))))


def sample(result: Result, device: torch.device, number: int = 0) -> dict[str, float]:
    """Seconds of each pass, once; the number of the round says which inputs it takes."""
    call = result.calls[number % len(result.calls)]
    return _cuda_sample(call) if device.type == "cuda" else _cpu_sample(call, result.repeats)


def _cpu_sample(call: Call, repeats: int) -> dict[str, float]:
    """Seconds of a forward (a mean over repeats), and of the backward of the last."""
    begin = time.perf_counter()
    for _ in range(repeats):
        out = call.forward()
    found = {"forward": (time.perf_counter() - begin) / repeats}
    if call.backward:
        begin = time.perf_counter()
        call.backward(out)
        found["backward"] = time.perf_counter() - begin
    return found


def _cuda_sample(call: Call) -> dict[str, float]:
    """By events; the GPU is kept busy while the call is queued."""
    found: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush().zero_()
        torch.cuda._sleep(_QUEUED_IN)
        begin.record()
        out = run()
        end.record()
        torch.cuda.synchronize()
        found[name] = begin.elapsed_time(end) * 1e-3
        return out

    out, backward = timed("forward", call.forward), call.backward
    if backward:
        timed("backward", lambda: backward(out))
    return found


@lru_cache
def _flush() -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rows(results: list[Result], entry: Entry, size: Size, ceilings: Ceilings) -> list[dict[str, Any]]:
    """A row for each contender and pass, without what the environment adds."""
    table = []
    ours = results[0]
    for result in results:
        precision = result.contender.precision_at(size)
        common = {
            "op": entry.name,
            "workload": size.workload,
            "size": str(size),
            "contender": result.contender.name,
            "backend": result.backend,
            "precision": precision,
            "package": result.contender.package,
        }
        if result.reason is not None:
            table.append({**common, "pass": "forward", "status": result.reason})
            continue
        assert result.verdict is not None
        for name, seconds in result.seconds.items():
            row = {**common, "pass": name, **_spread("ms", [1e3 * each for each in seconds], ".4g")}
            # Rounds are paired, so that what slows a whole round down leaves the ratio as it is.
            if name in ours.seconds:
                pairs = zip(seconds, ours.seconds[name], strict=True)
                row |= _spread("ratio", [other / our for other, our in pairs], ".3f")
            if name in entry.work:
                limit = ceilings.seconds(entry.work[name](size), precision)
                row["limit_percent"] = f"{100 * limit / statistics.median(seconds):.3g}"
            if name in result.megabytes:
                row["peak_mb"] = f"{result.megabytes[name]:.1f}"
            if result.verdict.differing is not None:
                row["differing"] = f"{result.verdict.differing:.2g}"
            row["error"] = f"{result.verdict.error:.2g}"
            row["status"] = "wrong" if result.verdict.wrong else "ok"
            table.append(row)
    return table


def _backend_of(entry: Entry, device: torch.device) -> str:
    """The backends that ours runs on for this entry."""
    probe = torch.empty(0, device=device)
    modules = [choose(op, probe).__module__ for op in entry.ops]
    # Compiled operations are torch's own objects.
    names = [name.split(".")[2] if name.startswith("dlvae_kernels.") else "native" for name in modules]
    return "+".join(dict.fromkeys(names))


def _spread(name: str, values: list[float], form: str) -> dict[str, str]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {
        name: format(statistics.median(values), form),
        f"{name}_p20": format(cuts[0], form),
        f"{name}_p80": format(cuts[3], form),
    }

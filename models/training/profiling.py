"""A profile of a few updates: a trace of torch's profiler, and a table of the time of parts and operations."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from .files import replacing, write_whole
from .step import PARTS

# Updates before the profile, which compile, choose algorithms and capture, and updates that are profiled.
_SKIPPED, _PROFILED = 10, 10
_LISTED = 15


class Profile:
    """Profiles a few updates of a run into trace.json (for chrome://tracing or Perfetto) and profile.txt."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._updates = 0
        self._begin = self._seconds = 0.0
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        plan = schedule(wait=_SKIPPED - 1, warmup=1, active=_PROFILED, repeat=1)
        self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profiler.start()

    def step(self) -> None:
        """Called after each update."""
        self._updates += 1
        if self._updates == _SKIPPED + _PROFILED:
            self._seconds = self._now() - self._begin
        self._profiler.step()
        if self._updates == _SKIPPED:
            self._begin = self._now()

    def close(self) -> None:
        """Called at the end of the run; reports a run that was too short."""
        if self._updates < _SKIPPED + _PROFILED:
            self._profiler.on_trace_ready = None
            print(f"no profile: it needs {_SKIPPED + _PROFILED} updates, the run did {self._updates}", file=sys.stderr)
        self._profiler.stop()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _write(self, profiler: Any) -> None:
        with replacing(self._folder / "trace.json") as (partial,):
            profiler.export_chrome_trace(str(partial))
        text = table(profiler.key_averages(), self._seconds / _PROFILED, self._device)
        write_whole(self._folder / "profile.txt", text)
        print(f"\n{text}  {'trace':60} {self._folder / 'trace.json'}")


def table(events: Iterable[Any], seconds: float, device: torch.device) -> str:
    """Milliseconds and fraction of an update of `seconds`: of GPU kernels, or of the parts and operations on the CPU.

    The time of an operation excludes the operations that it calls.
    """
    # The profiler's own ranges, one around each update.
    events = [each for each in events if not each.key.startswith("ProfilerStep")]
    text = f"An update takes {seconds * 1e3:.3f} ms\n"
    if device.type == "cuda":
        # Ranges that are named on the host appear on the device too, around their kernels.
        on_device = [each for each in events if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
        kernels = {each.key: each.self_device_time_total for each in on_device}
        return text + _section("kernel", kernels, seconds)
    parts = {each.key: each.cpu_time_total for each in events if each.key in PARTS}
    rest = {each.key: each.self_cpu_time_total for each in events if each.key not in PARTS}
    in_order = {name: parts[name] for name in PARTS if name in parts}
    return text + _section("part", in_order, seconds) + _section("operation", rest, seconds)


def _section(title: str, microseconds: dict[str, float], seconds: float) -> str:
    """A row for each part in order, or for the longest kernels or operations, and one for the remaining time."""
    times = {name: value / _PROFILED / 1e6 for name, value in microseconds.items()}
    if title != "part":
        times = dict(sorted(times.items(), key=lambda item: -item[1])[:_LISTED])
    times["other"] = max(0.0, seconds - sum(times.values()))
    rows = (f"  {name[:60]:60} {1e3 * each:9.3f} ms {each / seconds:6.1%}\n" for name, each in times.items())
    return f"{title}\n{''.join(rows)}"

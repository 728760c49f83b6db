"""Where an update goes: a trace of torch's profiler, and a table of its parts and operations."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .files import replacing, write_whole
from .step import PARTS

# Updates before, which compile, choose and capture, and updates that are profiled.
_SKIPPED, _PROFILED = 10, 10
_SHOWN = 15


class Profile:
    """Profiles a few updates of a run into trace.json (for chrome://tracing or Perfetto) and profile.txt."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._updates = 0
        self._begin = 0.0
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profiler = profile(activities=activities)

    def step(self) -> None:
        """To be called after each update."""
        self._updates += 1
        if self._updates == _SKIPPED:
            self._profiler.start()
            self._begin = self._now()
        elif self._updates == _SKIPPED + _PROFILED:
            seconds = self._now() - self._begin
            self._profiler.stop()
            self._write(seconds / _PROFILED)

    def close(self) -> None:
        """To be called at the end of the run; tells if it came too early."""
        if self._updates < _SKIPPED + _PROFILED:
            if self._updates >= _SKIPPED:
                self._profiler.stop()
            print(f"no profile: it needs {_SKIPPED + _PROFILED} updates, the run did {self._updates}", file=sys.stderr)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _write(self, seconds: float) -> None:
        with replacing(self._folder / "trace.json") as (partial,):
            self._profiler.export_chrome_trace(str(partial))
        text = table(self._profiler.key_averages(), seconds, self._device)
        write_whole(self._folder / "profile.txt", text)
        print(f"\n{text}  {'trace':60} {self._folder / 'trace.json'}")


def table(events: Iterable[Any], seconds: float, device: torch.device) -> str:
    """Milliseconds and shares of an update that takes `seconds`: on a GPU of its kernels, else of parts and operations.

    A kernel or an operation counts without those that it calls.
    """
    events = list(events)
    text = f"An update takes {seconds * 1e3:.3f} ms\n"
    if device.type == "cuda":
        # The ranges that are named on the host show up on the device too, around their kernels.
        on_device = [each for each in events if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
        kernels = {each.key: each.self_device_time_total for each in on_device}
        return text + _section("kernel", kernels, seconds)
    parts = {each.key: each.cpu_time_total for each in events if each.key in PARTS}
    rest = {each.key: each.self_cpu_time_total for each in events if each.key not in PARTS}
    in_order = {name: parts[name] for name in PARTS if name in parts}
    return text + _section("part", in_order, seconds) + _section("operation", rest, seconds)


def _section(title: str, microseconds: dict[str, float], seconds: float) -> str:
    """Rows of what took longest, in the order of the parts or from the longest on, and of all else."""
    times = {name: value / _PROFILED / 1e6 for name, value in microseconds.items()}
    if title != "part":
        times = dict(sorted(times.items(), key=lambda item: -item[1])[:_SHOWN])
    times["all else"] = max(0.0, seconds - sum(times.values()))
    rows = (f"  {name[:60]:60} {1e3 * each:9.3f} ms {each / seconds:6.1%}\n" for name, each in times.items())
    return f"{title}\n{''.join(rows)}"

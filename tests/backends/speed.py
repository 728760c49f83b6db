"""Slow-downs that hold on a noisy machine: CPU time of one thread, medians, several tries."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

Call = Callable[[], object]


def _seconds(call: Call, repeats: int = 5) -> float:
    """CPU time of this thread, which other processes do not lengthen."""
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        found.append(time.thread_time() - start)
    return median(found)


def slowdown(call: Call, ordinary: Call, most: float, tries: int = 4) -> float:
    """Median time of a call divided by that of another; the least of several tries, until one is at most `most`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: list[float] = []
        while len(found) < tries and (not found or min(found) > most):
            ordinary()
            found.append(_seconds(call) / _seconds(ordinary))
        return min(found)
    finally:
        torch.set_num_threads(before)


def subnormal_penalty() -> float:
    """The time of a product of subnormal numbers divided by that of ordinary ones."""
    x = torch.rand(4096) + 1
    return slowdown(lambda: (x * 1e-40) * 0.5, lambda: (x * 1e-10) * 0.5, 2)

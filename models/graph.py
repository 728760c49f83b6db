"""Repetition of a step as one CUDA graph: a single launch instead of hundreds."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

# Updates launch by launch before the capture: they compile kernels, choose algorithms and make the optimizer's state.
_BEFORE_CAPTURE = 3


def why_not(device: torch.device, ranks: int) -> str | None:
    """Why steps on a device cannot be repeated as a graph, or None where they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if ranks > 1:
        return "DistributedDataParallel joins the gradients of several ranks from the host"
    return None


class Repeated:
    """A step that reads and writes tensors on a GPU alone, the same ones each time.

    Its first calls run launch by launch, which are updates as any other. Where the capture fails all of them do, and
    the reason goes to stderr.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._fails = False

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> None:
        if self._graph is None and self._calls == _BEFORE_CAPTURE and not self._fails:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        elif self._fails:
            self._step()
        else:
            self._calls += 1
            self._run_aside()

    def _run_aside(self) -> None:
        """On a stream of its own, as what is captured later has to have run before."""
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._step()
        current.wait_stream(side)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, which pin memory, may go on meanwhile.
            with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            self._fails = True
            print(f"no CUDA graph, updates run launch by launch: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            self._graph = graph

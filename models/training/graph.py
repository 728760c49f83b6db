"""Replay of a training step as one CUDA graph: one launch in place of hundreds."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch

# Steps without a graph before the capture: they compile kernels, choose algorithms and create the optimizer's state.
_WARMUP_STEPS = 3


def print_disabled(reason: str) -> None:
    print(f"no CUDA graph, kernels are launched one by one: {reason}", file=sys.stderr)


class GraphedStep:
    """A step that reads and writes only tensors on a GPU, the same ones at each call.

    The first calls run the step itself and count as updates. If the last of these synchronises with the GPU, which a
    graph cannot, or if the capture fails, all further calls run the step too, and the reason is printed.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._device = device
        # The warm-up has to run on a stream that is not the default one.
        self._side_stream = torch.cuda.Stream(device)
        self._calls = 0
        self._replay: Callable[[], None] | None = None

    @property
    def is_captured(self) -> bool:
        return self._replay not in (None, self._step)

    def __call__(self) -> None:
        self._calls += 1
        if self._replay is not None:
            self._replay()
        elif self._calls < _WARMUP_STEPS:
            self._run_on_side_stream()
        elif (reason := self._run_and_find_synchronisation()) is not None:
            self._disable(reason)
        else:
            self._capture()

    def _run_on_side_stream(self) -> None:
        current = torch.cuda.current_stream(self._device)
        self._side_stream.wait_stream(current)
        with torch.cuda.stream(self._side_stream):
            self._step()
        current.wait_stream(self._side_stream)

    def _run_and_find_synchronisation(self) -> str | None:
        """Run the step; returns the first line in it that synchronises with the GPU."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self._run_on_side_stream()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        found = (each for each in caught if "called a synchronizing" in str(each.message))
        return next((f"{each.filename}:{each.lineno} waits for the GPU" for each in found), None)

    def _capture(self) -> None:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # Other threads, which pin memory, may continue.
            capture = torch.cuda.graph(graph, stream=self._side_stream, capture_error_mode="thread_local")
            with torch.cuda.device(self._device), capture:
                self._step()
        except RuntimeError as error:
            # The context of the error names the operation; the error itself is that of the end of the capture.
            self._disable(str(error.__context__ or error).splitlines()[0])
            self._recover(current)
        else:
            self._replay = graph.replay

    def _disable(self, reason: str) -> None:
        self._replay = self._step
        print_disabled(reason)

    def _recover(self, current: torch.cuda.Stream) -> None:
        """Undo a failed capture: it leaves its stream current and, in older torch, the random generator capturing."""
        torch.cuda.set_stream(current)
        empty = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            empty.capture_begin(capture_error_mode="thread_local")
            empty.capture_end()

"""Repetition of a step as one CUDA graph: a single launch instead of hundreds."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch

# Updates launch by launch before the capture: they compile kernels, choose algorithms and make the optimizer's state.
_BEFORE_CAPTURE = 3


class Repeated:
    """A step that reads and writes tensors on a GPU alone, the same ones each time.

    Its first calls run launch by launch, which are updates as any other. Where the last of them waits for the GPU,
    which a graph cannot, or the capture fails, all calls do, and the reason goes to stderr.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._device = device
        # What is captured later has to have run before on a stream other than the default one.
        self._aside = torch.cuda.Stream(device)
        self._calls = 0
        self._repeat: Callable[[], None] | None = None

    @property
    def is_captured(self) -> bool:
        return self._repeat not in (None, self._step)

    def __call__(self) -> None:
        self._calls += 1
        if self._repeat is not None:
            self._repeat()
        elif self._calls < _BEFORE_CAPTURE:
            self._run_aside()
        elif (waiting := self._watched_run()) is not None:
            self._refuse(waiting)
        else:
            self._capture()

    def _run_aside(self) -> None:
        current = torch.cuda.current_stream(self._device)
        self._aside.wait_stream(current)
        with torch.cuda.stream(self._aside):
            self._step()
        current.wait_stream(self._aside)

    def _watched_run(self) -> str | None:
        """Run the step; gives the first place in it that waits for the GPU."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self._run_aside()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = (each for each in caught if "called a synchronizing" in str(each.message))
        return next((f"{each.filename}:{each.lineno} waits for the GPU" for each in waits), None)

    def _capture(self) -> None:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # Other threads, which pin memory, may go on meanwhile.
            capture = torch.cuda.graph(graph, stream=self._aside, capture_error_mode="thread_local")
            with torch.cuda.device(self._device), capture:
                self._step()
        except RuntimeError as error:
            # The operation that cannot be captured comes first; ending the capture raises an error of its own.
            self._refuse(str(error.__context__ or error).splitlines()[0])
            self._recover(current)
        else:
            self._repeat = graph.replay

    def _refuse(self, reason: str) -> None:
        self._repeat = self._step
        print(f"no CUDA graph, updates run launch by launch: {reason}", file=sys.stderr)

    def _recover(self, current: torch.cuda.Stream) -> None:
        """A capture that fails leaves its stream the current one, and older torch's random numbers in the capture."""
        torch.cuda.set_stream(current)
        empty = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            empty.capture_begin(capture_error_mode="thread_local")
            empty.capture_end()

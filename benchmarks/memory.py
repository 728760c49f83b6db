"""Peak memory of an implementation beyond its inputs, for a forward pass and for forward and backward together.

On a GPU the allocator reports it. On the CPU it is the growth of the resident set of a child process. The child is
forked from a server that has imported all modules and computed nothing, because threads do not survive a fork.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import multiprocessing
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dlvae_kernels.backends import use_backend

from .calls import Call
from .entry import Entry, Implementation
from .inputs import Size, draw

_SECONDS = 300
_MOST_VECTORS = 2**18
# Modules that take long to import. The server ignores those that are not installed.
_PRELOADED = [
    *("benchmarks.registry", "benchmarks.compat", "torch._inductor.compile_fx"),
    *("sklearn.metrics", "faiss", "vector_quantize_pytorch"),
]


def peak_on_cuda(call: Call, device: torch.device) -> dict[str, float]:
    """Peak memory by pass in MB (10^6 bytes), of a call that has run before."""
    found = {}
    for name in call.passes:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call.run(name)
        found[name] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return found


def peak_on_cpu(entry: Entry, size: Size, implementation: Implementation, backend: str | None) -> dict[str, float]:
    """Peak memory by pass in MB (10^6 bytes).

    Raises:
        RuntimeError: see `in_child`.
    """
    arguments = entry.name, size, implementation.name, backend, torch.get_num_threads()
    return in_child(_peaks, arguments, f"{implementation.name} in {entry.name} at {size}")


def in_child(function: Callable[..., Any], arguments: tuple[Any, ...], name: str) -> Any:
    """The result of a function in a child process. The error names the case.

    Raises:
        RuntimeError: the child process was killed or did not finish in time.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    with server.Pool(1) as pool:
        try:
            found = pool.apply_async(function, arguments).get(_SECONDS)
        except multiprocessing.TimeoutError:
            raise RuntimeError(f"expected the memory of {name} within {_SECONDS} s, got no answer") from None
        # The child ends by itself and frees its resources; leaving the block would kill it.
        pool.close()
        pool.join()
        return found


def _peaks(entry_name: str, size: Size, name: str, backend: str | None, threads: int) -> dict[str, float]:
    from .registry import ENTRIES

    torch.set_num_threads(threads)
    entry = ENTRIES[entry_name]
    (implementation,) = (each for each in entry.implementations if each.name == name)
    with use_backend(backend) if backend else nullcontext():
        call = implementation.prepare(draw(size, torch.device("cpu"), unit=entry.unit))
        # The first run loads libraries, fills caches and compiles. Part of very many vectors is enough for that.
        part = dataclasses.replace(size, n=min(size.n, _MOST_VECTORS))
        first = call if part == size else implementation.prepare(draw(part, torch.device("cpu"), unit=entry.unit))
        first.run(call.passes[-1])
        return {name: growth(partial(call.run, name)) for name in call.passes}


def growth(run: Callable[[], Any]) -> float:
    """The growth of the resident set of this process during a call, in MB."""
    gc.collect()
    # Freed memory goes back to the system, so that a new allocation counts.
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run()
    return max(0.0, _resident("VmHWM") - before)


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (each for each in lines if each.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6

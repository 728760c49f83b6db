"""Peak memory that a contender takes beyond its inputs.

On a GPU the allocator knows it. On the CPU it is the growth of the resident set, measured in a child process that is
forked from a server which has imported everything and computed nothing: the threads of a parent do not survive a fork.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from dlvae_kernels.backends import use_backend

from .entry import Call, Contender, Entry, Size, draw

_SECONDS = 120
# Imports that take long; what is not installed is passed over.
_PRELOADED = [
    "benchmarks.registry",
    "torch._inductor.compile_fx",
    "sklearn.metrics",
    "faiss",
    "vector_quantize_pytorch",
]


def peak_on_cpu(entry: Entry, size: Size, contender: Contender, backend: str | None) -> dict[str, float]:
    """Of the forward, and of forward and backward together; MB of 10^6 bytes.

    Raises:
        RuntimeError: the child process failed.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    receiver, sender = server.Pipe(duplex=False)
    child = server.Process(
        target=_child, args=(sender, entry.name, size, contender.name, backend, torch.get_num_threads())
    )
    child.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(_SECONDS) else None
    except EOFError:
        found = None
    child.kill() if found is None else child.join()
    if found is None:
        raise RuntimeError(f"the memory of {contender.name} in {entry.name} at {size} could not be measured")
    return found


def _child(sender: Connection, entry_name: str, size: Size, name: str, backend: str | None, threads: int) -> None:
    from .registry import ENTRIES

    torch.set_num_threads(threads)
    entry = ENTRIES[entry_name]
    (contender,) = (each for each in entry.contenders if each.name == name)
    with use_backend(backend) if backend else nullcontext():
        call = contender.prepare(draw(size, torch.device("cpu"), unit=entry.unit))
        # Once before: libraries load, caches fill, compilers run.
        call.run(call.passes[-1])
        sender.send({name: _growth(call, name) for name in call.passes})


def _growth(call: Call, name: str) -> float:
    gc.collect()
    # What was freed goes back to the system, so that taking it again is seen.
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call.run(name)
    return max(0.0, _resident("VmHWM") - before)


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (each for each in lines if each.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def peak_on_cuda(call: Call, device: torch.device) -> dict[str, float]:
    """Of a call that has run before, as on the CPU."""
    found = {}
    for name in call.passes:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call.run(name)
        found[name] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return found

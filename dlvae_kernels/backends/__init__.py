"""Which backend runs an operation.

The choice is made at each call, from the inputs, and never fixed at import. A backend is a module that holds one
function an operation and `why_not(op, *args)`, the reason why it cannot run one (None: it can).
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from . import native, reference, triton

__all__ = ["BACKENDS", "BackendUnavailable", "backend_info", "choose", "forced_backend", "use_backend", "why_not"]

BACKENDS: dict[str, ModuleType] = {"triton": triton, "native": native, "reference": reference}
# Before the reference, which runs everything.
_PREFERENCE = {"cuda": ("triton", "native"), "cpu": ("native",)}

_log = logging.getLogger("dlvae_kernels")
_logged: set[tuple[str, str]] = set()
# The active `use_backend` blocks of all threads, the oldest first.
_blocks: list[_Block] = []


class _Block:
    """One `use_backend` block: the thread that entered it, and the backend that it forces."""

    def __init__(self, backend: str) -> None:
        self.thread = threading.get_ident()
        self.backend = backend


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run these inputs; the message says why."""


def _checked_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it needs to be one of {', '.join(BACKENDS)}")
    return name


def forced_backend() -> str | None:
    """The backend forced by `use_backend` or else by the variable DLVAE_BACKEND, or None.

    A thread is bound by its own blocks alone. Only autograd's threads, which run the backward of CUDA tensors and enter
    no block themselves, are bound by the newest block of any thread.
    """
    if _blocks:
        own = threading.get_ident()
        newest = next((block for block in reversed(_blocks.copy()) if block.thread == own), None)
        if newest is None and torch._C._current_graph_task_id() != -1:
            newest = _blocks[-1]
        if newest is not None:
            return newest.backend
    name = os.environ.get("DLVAE_BACKEND")
    return _checked_name(name, "DLVAE_BACKEND") if name else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every operation of this thread onto one backend: `with use_backend("reference"): ...`.

    Args:
        name: "triton", "native" or "reference".
    Raises:
        ValueError: no backend has that name.

    Inside, an input that the backend cannot take raises `BackendUnavailable`; nothing falls back. The backward runs on
    the backend too as long as it is called inside the block. Blocks of several threads may overlap.
    """
    block = _Block(_checked_name(name, "name"))
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)


def why_not(backend: str, op: str, *args: Any) -> str | None:
    """Why `backend` cannot run `op` on `args` (without args: at all, on this machine); None if it can."""
    return BACKENDS[_checked_name(backend, "backend")].why_not(op, *args)


def backend_info() -> dict[str, dict[str, str | None]]:
    """For each operation and backend, the reason why it cannot run on this machine, or None where it can."""
    return {op: {backend: why_not(backend, op) for backend in BACKENDS} for op in reference.__all__}


def choose(op: str, *args: Any) -> Callable[..., Any]:
    """The implementation of `op` for these inputs.

    Raises:
        BackendUnavailable: a backend or an instruction set is forced and cannot take them.
    """
    forced = forced_backend()
    if forced is not None:
        reason = why_not(forced, op, *args)
        if reason is not None:
            raise BackendUnavailable(f"{op}: the backend {forced!r} was asked for, but {reason}")
        return getattr(BACKENDS[forced], op)
    device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
    if device == "cpu" and (reason := native.why_no_instruction_set()) is not None:
        raise BackendUnavailable(f"{op}: {reason}; set DLVAE_CPU to one of these, or not at all")
    reasons: list[str] = []
    for name in _PREFERENCE.get(device, ()):
        reason = why_not(name, op, *args)
        if reason is None:
            break
        reasons.append(f"not {name}: {reason}")
    else:
        name = "reference"
    _log_choice(op, device, name, reasons)
    return getattr(BACKENDS[name], op)


def _log_choice(op: str, device: str, name: str, reasons: list[str]) -> None:
    """Say once per operation and device which backends cannot run it: on a GPU, where a fallback is slow, as a warning.

    A CPU without the C++ library gets one warning for all operations.
    """
    if not reasons or (op, device) in _logged:
        return
    _logged.add((op, device))
    level = logging.WARNING if device == "cuda" else logging.INFO
    _log.log(level, "%s on %s runs on the backend %s (%s)", op, device, name, "; ".join(reasons))
    if device == "cpu" and (missing := native.why_not_loaded()) is not None and ("", device) not in _logged:
        _logged.add(("", device))
        warnings.warn(
            f"dlvae_kernels runs in plain PyTorch on the CPU, many times slower than its C++ kernels: {missing}."
            " Install a C++ compiler and then the package again (in a checkout: python setup.py build_ext --inplace),"
            ' or choose plain PyTorch by DLVAE_BACKEND=reference or use_backend("reference")',
            stacklevel=2,
        )

"""Routing of operations to backends.

The route, the backend that runs a call, is found at each call and never fixed at import. It depends on the operation,
the dtypes and devices of its tensors, sizes that a kernel limits, `use_backend`, and the variables DLVAE_BACKEND,
DLVAE_CPU and TRITON_INTERPRET. A backend is a module with one function per operation and
`unavailable_reason(op, *args)`, which returns why the backend is unavailable for these arguments, or None.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import native, reference
from .triton import operations as triton_operations

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "backend_info",
    "choose",
    "forced_backend",
    "unavailable_reason",
    "use_backend",
]

BACKENDS: dict[str, ModuleType] = {"triton": triton_operations, "native": native, "reference": reference}
# The backends to try, in order, before the reference, which runs everything.
_PREFERENCE = {"cuda": ("triton", "native"), "cpu": ("native",)}

_log = logging.getLogger("dlvae_kernels")
_logged: set[tuple[str, str]] = set()
# The active `use_backend` blocks of all threads, the oldest first.
_blocks: list[_Block] = []

# The dictionary inside os.environ: its `get` takes 0.1 us for a variable that is not set, that of os.environ 1.7 us.
_environment: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]
_DLVAE_BACKEND, _DLVAE_CPU, _TRITON_INTERPRET = map(
    os.environ.encodekey, ("DLVAE_BACKEND", "DLVAE_CPU", "TRITON_INTERPRET")
)


class Route(NamedTuple):
    """The implementation that runs an operation, and whether it checks the range of indices by itself."""

    function: Callable[..., Any]
    checks_indices: bool


# The routes found so far, by everything that they depend on.
_routes: dict[tuple[Any, ...], Route] = {}


class _Block:
    """One `use_backend` block: the thread that entered it, and the backend that it forces."""

    def __init__(self, backend: str) -> None:
        self.thread = threading.get_ident()
        self.backend = backend


class BackendUnavailable(RuntimeError):
    """The forced backend cannot run these inputs; the message holds the reason.

    >>> try:
    ...     with use_backend("native"):
    ...         indices = nearest_code(torch.zeros(2, 3).double(), torch.zeros(4, 3).double())
    ... except BackendUnavailable as error:
    ...     print("nearest_code: backend 'native' is forced, but" in str(error))
    True
    """


def _checked_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"expected {source} to be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def forced_backend() -> str | None:
    """The backend forced by `use_backend` or else by the variable DLVAE_BACKEND, or None.

    A block applies to its own thread. Autograd's worker threads, which run the backward of CUDA tensors and enter no
    block themselves, use the newest block of any thread.
    """
    if _blocks:
        own = threading.get_ident()
        newest = next((block for block in reversed(_blocks.copy()) if block.thread == own), None)
        if newest is None and torch._C._current_graph_task_id() != -1:
            newest = _blocks[-1]
        if newest is not None:
            return newest.backend
    return _checked_name(os.environ["DLVAE_BACKEND"], "DLVAE_BACKEND") if _environment.get(_DLVAE_BACKEND) else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every operation of this thread onto one backend.

    Args:
        name: "triton", "native" or "reference".
    Raises:
        ValueError: no backend has that name.

    Inside the block, an input that the backend cannot run raises `BackendUnavailable`; nothing falls back to another
    backend. The backward runs on the backend too as long as it is called inside the block. Blocks of several threads
    may overlap.

    >>> with use_backend("reference"):
    ...     nearest_code(torch.tensor([[3.0]]), torch.tensor([[0.0], [4.0]])).tolist()
    [1]
    """
    block = _Block(_checked_name(name, "name"))
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)


def unavailable_reason(backend: str, op: str, *args: Any) -> str | None:
    """Why `backend` is unavailable for `op` on `args` (without args: on this machine); None where it is available."""
    return BACKENDS[_checked_name(backend, "backend")].unavailable_reason(op, *args)


def backend_info() -> dict[str, dict[str, str | None]]:
    """For each operation and backend, the reason why it is unavailable on this machine, or None where it is available.

    >>> backend_info()["nearest_code"]["reference"] is None
    True
    """
    return {op: {backend: unavailable_reason(backend, op) for backend in BACKENDS} for op in reference.__all__}


def choose(op: str, *args: Any) -> Callable[..., Any]:
    """The implementation of `op` for these arguments.

    Raises:
        BackendUnavailable: a backend or an instruction set is forced and is unavailable for them.
    """
    return find_route(op, *args).function


def find_route(op: str, *args: Any) -> Route:
    """The route of `op` for these arguments, memoised on everything that it depends on; see `choose`."""
    forced = forced_backend() if _blocks or _environment.get(_DLVAE_BACKEND) else None
    key: tuple[Any, ...] = (op, forced, _environment.get(_DLVAE_CPU), _environment.get(_TRITON_INTERPRET))
    for arg in args:
        if isinstance(arg, torch.Tensor):
            key += (arg.dtype, arg.device)
    if op == "topk_codes" and len(args) > 2:
        # Some kernels limit k, with a limit that may depend on the number of codes.
        key += (args[2], len(args[1]))
    route = _routes.get(key)
    if route is None:
        # An error is not memoised: it is raised at each call.
        route = _routes[key] = _new_route(forced, op, *args)
    return route


def _new_route(forced: str | None, op: str, *args: Any) -> Route:
    device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
    reasons: list[str] = []
    if forced is not None:
        name = forced
        if (reason := unavailable_reason(forced, op, *args)) is not None:
            is_float64 = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float64 for arg in args)
            remedy = "pass float32 inputs or " if is_float64 else ""
            raise BackendUnavailable(
                f'{op}: backend {forced!r} is forced, but {reason}; {remedy}use_backend("reference")'
            )
    else:
        if device == "cpu" and (reason := native.instruction_set_unavailable_reason()) is not None:
            raise BackendUnavailable(f"{op}: {reason}; set DLVAE_CPU to one of these, or unset it")
        for name in _PREFERENCE.get(device, ()):
            if (reason := unavailable_reason(name, op, *args)) is None:
                break
            reasons.append(f"not {name}: {reason}")
        else:
            name = "reference"
    _log_route(op, device, name, reasons)
    checks_indices = name == "native" and device == "cpu" and op in native.CHECKS_INDICES
    return Route(getattr(BACKENDS[name], op), checks_indices)


def _log_route(op: str, device: str, name: str, reasons: list[str]) -> None:
    """Log once per operation and device which preferred backends are unavailable.

    The level is a warning on a GPU, where the fallback is slow. A CPU without the C++ library gives one warning for all
    operations.
    """
    if not reasons or (op, device) in _logged:
        return
    _logged.add((op, device))
    level = logging.WARNING if device == "cuda" else logging.INFO
    _log.log(level, "%s on %s runs on the backend %s (%s)", op, device, name, "; ".join(reasons))
    if device == "cpu" and (missing := native.library_unavailable_reason()) is not None and ("", device) not in _logged:
        _logged.add(("", device))
        warnings.warn(
            f"dlvae_kernels runs in plain PyTorch on the CPU, many times slower than its C++ kernels: {missing}."
            " Install a C++ compiler and then the package again (in a checkout: python setup.py build_ext --inplace),"
            ' or select plain PyTorch by DLVAE_BACKEND=reference or use_backend("reference")',
            stacklevel=2,
        )

"""The compiled backend: the library built from csrc for the CPU, or the reason why there is none."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).parents[1] / "native_cpu.abi3.so"
# Left by setup.py in place of the library.
_REASON = _LIBRARY.with_name("native_cpu.reason.txt")
_OLDEST_TORCH = (2, 10)
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int64)


@functools.cache
def _load() -> str | None:
    """Load the library, once and not before an operation asks for it; why it cannot be, or None."""
    if not _LIBRARY.exists():
        reason = _REASON.read_text().strip() if _REASON.exists() else "setup.py has not run here"
        return f"the C++ library was not built: {reason}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        return f"torch is {torch.__version__}, and the C++ library needs 2.10 or newer"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the C++ library does not load: {error}"
    return None


@functools.cache
def instruction_sets(everywhere: bool = False) -> list[str]:
    """Names that DLVAE_CPU may have on this processor, or on any, the best first; none without the library."""
    return [] if _load() is not None else torch.ops.dlvae_native.cpu_names(everywhere).split()


def instruction_set() -> str:
    """The one in use, which DLVAE_CPU may name."""
    return os.environ.get("DLVAE_CPU") or instruction_sets()[0]


def _why_not_cpu() -> str | None:
    name = instruction_set()
    if name in instruction_sets():
        return None
    if name in instruction_sets(everywhere=True):
        return f"DLVAE_CPU is {name!r}, which this processor lacks; it has {', '.join(instruction_sets())}"
    raise ValueError(f"DLVAE_CPU is {name!r}; it needs to be one of {', '.join(instruction_sets(everywhere=True))}")


def why_not(op: str, *args: Any) -> str | None:
    """Why this backend cannot run `op` on `args`; None if it can.

    Raises:
        ValueError: DLVAE_CPU names no instruction set.
    """
    if (reason := _load()) is not None:
        return reason
    if not hasattr(torch.ops.dlvae_native, op):
        return "this version has no compiled kernel for it"
    for arg in args:
        if not isinstance(arg, torch.Tensor):
            continue
        if arg.device.type != "cpu":
            return f"the tensors are on {arg.device.type}, and it runs on the CPU"
        if arg.dtype not in _TYPES:
            return f"it has no kernel for {arg.dtype}"
    return _why_not_cpu()


def __getattr__(name: str) -> Any:
    if name.startswith("_") or _load() is not None or not hasattr(torch.ops.dlvae_native, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.ops.dlvae_native, name)

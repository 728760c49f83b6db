"""The compiled backend: the library built from csrc for the CPU, or the reason why there is none."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).parents[1] / "native_cpu.abi3.so"
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int64)


@functools.cache
def _load() -> str | None:
    """Load the library, once; why it cannot be, or None."""
    if not _LIBRARY.exists():
        return "the C++ library was not built"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the C++ library does not load: {error}"
    return None


def why_not(op: str, *args: Any) -> str | None:
    """Why this backend cannot run `op` on `args`; None if it can."""
    if (reason := _load()) is not None:
        return reason
    if not hasattr(torch.ops.dlvae_native, op):
        return f"this version has no compiled kernel for {op}"
    for arg in args:
        if not isinstance(arg, torch.Tensor):
            continue
        if arg.device.type != "cpu":
            return f"the tensors are on {arg.device.type}, and it runs on the CPU"
        if arg.dtype not in _TYPES:
            return f"it has no kernel for {arg.dtype}"
    return None


def __getattr__(name: str) -> Any:
    if name.startswith("_") or _load() is not None or not hasattr(torch.ops.dlvae_native, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.ops.dlvae_native, name)

"""The Triton backend: the main path for CUDA tensors, or the reason why it cannot run.

Its modules import triton, and are themselves imported when an operation first runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

from . import limits

# Operation -> the module that holds it.
_MODULES = {
    "nearest_code": "nearest_code",
    "topk_codes": "topk_codes",
    "one_hot": "one_hot",
    "gather_codes_fwd": "gather_codes",
    "gather_codes_bwd": "gather_codes",
    "vector_quantize_fwd": "vector_quantize",
    "vector_quantize_bwd": "vector_quantize",
    "ema_statistics": "ema_update",
    "ema_step": "ema_update",
    "sparse_decode_fwd": "sparse_decode",
    "sparse_decode_bwd": "sparse_decode",
    "kept_softmax_fwd": "kept_softmax",
    "kept_softmax_bwd": "kept_softmax",
}
_LEAST_CAPABILITY = (8, 0)
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int64)


def unavailable_reason(op: str, *args: Any) -> str | None:
    """Why this backend cannot run `op` on `args`; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if op not in _MODULES:
        return f"this version has no Triton kernel for {op}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    for arg in args:
        if not isinstance(arg, torch.Tensor):
            continue
        if arg.device.type != "cuda" and not interpreted:
            return f"the tensors are on {arg.device.type}, and it runs on cuda"
        if arg.dtype not in _TYPES:
            return f"it has no kernel for {arg.dtype}"
        if not interpreted and (capability := torch.cuda.get_device_capability(arg.device)) < _LEAST_CAPABILITY:
            return f"it needs compute capability {_LEAST_CAPABILITY} or newer, and {arg.device} has {capability}"
    limit = getattr(limits, op, None)
    return limit(*args) if limit else None


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    # Importing a module has put it here under its name, which may be that of the operation.
    globals()[name] = function
    return function

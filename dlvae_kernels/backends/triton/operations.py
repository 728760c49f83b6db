"""The operations of the Triton backend, as attributes of this module, or the reason why one is unavailable.

The files that implement them import triton, and are imported when an operation first runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

from .topk import limits

# Each operation and the file that implements it.
_FILES = {
    "nearest_code": "nearest_code",
    "topk_codes": "topk_codes",
    "one_hot": "one_hot",
    "gather_codes_fwd": "gather_codes",
    "gather_codes_bwd": "gather_codes",
    "vector_quantize_fwd": "vector_quantize",
    "vector_quantize_bwd": "vector_quantize",
    "rotation_trick_bwd": "rotation_trick",
    "ema_statistics": "ema_update",
    "ema_step": "ema_update",
    "residual_quantize_fwd": "residual_quantize",
    "residual_quantize_bwd": "residual_quantize",
    "residual_statistics": "residual_quantize",
    "sparse_decode_fwd": "sparse_decode",
    "sparse_decode_bwd": "sparse_decode",
    "kept_softmax_fwd": "kept_softmax",
    "kept_softmax_bwd": "kept_softmax",
    "code_entropy_fwd": "code_entropy",
    "code_entropy_bwd": "code_entropy",
}
# Operations with limits beside those of dtype and device: a function that returns the reason, or None.
_LIMITS = {"topk_codes": limits.unavailable_reason}
_OLDEST_GPU = (8, 0)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool)


def unavailable_reason(op: str, *args: Any) -> str | None:
    """Why this backend is unavailable for `op` on `args`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if op not in _FILES:
        return f"this version has no Triton kernel for {op}"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not is_interpreted and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    for arg in args:
        if not isinstance(arg, torch.Tensor):
            continue
        if arg.device.type != "cuda" and not is_interpreted:
            return f"the tensors are on {arg.device.type}, and it runs on cuda"
        if arg.dtype not in _DTYPES:
            return f"it has no kernel for {arg.dtype}"
        if not is_interpreted and (capability := torch.cuda.get_device_capability(arg.device)) < _OLDEST_GPU:
            return f"it needs compute capability {_OLDEST_GPU} or newer, and {arg.device} has {capability}"
    limit = _LIMITS.get(op)
    return limit(*args) if limit else None


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f".{_FILES[name]}", __package__), name)
    globals()[name] = function
    return function

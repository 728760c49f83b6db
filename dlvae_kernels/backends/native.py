"""The native backend: the compiled libraries of csrc for the CPU and for CUDA, or the reason why one is unavailable."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).parents[1] / "native_cpu.abi3.so"
# setup.py writes this file in place of a library that it could not build.
_REASON = _LIBRARY.with_name("native_cpu.reason.txt")
_CUDA_LIBRARY, _CUDA_REASON = _LIBRARY.with_name("native_cuda.abi3.so"), _LIBRARY.with_name("native_cuda.reason.txt")
_OLDEST_TORCH = (2, 10)
_OLDEST_GPU = (8, 0)
# The limit of k of topk_codes on CUDA, MOST_K in csrc/cuda/topk_codes_cuda.cu.
_MOST_SELECTED = 1024
# Operations whose kernels on the CPU check the range of the caller's indices as they read them.
CHECKS_INDICES = ("gather_codes_fwd", "one_hot", "ema_statistics", "residual_statistics", "sparse_decode_fwd")
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int64)
# Operations with kernels for masks.
_MASKED = ("code_entropy_bwd", "code_entropy_fwd", "residual_quantize_fwd", "vector_quantize_fwd")


@functools.cache
def library_unavailable_reason() -> str | None:
    """Load the C++ library at the first call; return the reason why it is unavailable, or None."""
    return _load_library("C++", _LIBRARY, _REASON)


@functools.cache
def _load_cuda() -> str | None:
    """Load the CUDA library, whose operations the C++ library defines; return why it is unavailable, or None."""
    if (reason := library_unavailable_reason()) is not None:
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return _load_library("CUDA C++", _CUDA_LIBRARY, _CUDA_REASON)


def _load_library(name: str, library: Path, reason: Path) -> str | None:
    if not library.exists():
        text = reason.read_text().strip() if reason.exists() else "setup.py has not run here"
        return f"the {name} library was not built: {text}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        return f"the {name} library requires torch 2.10 or newer, got {torch.__version__}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the {name} library does not load: {error}"
    return None


@functools.cache
def instruction_sets(everywhere: bool = False) -> list[str]:
    """The values of DLVAE_CPU for this processor (or all values), the fastest first; none without the C++ library."""
    return [] if library_unavailable_reason() is not None else torch.ops.dlvae_native.cpu_names(everywhere).split()


def instruction_set() -> str:
    """The instruction set in use: that of DLVAE_CPU, or else the fastest of this processor."""
    return os.environ.get("DLVAE_CPU") or instruction_sets()[0]


def instruction_set_unavailable_reason() -> str | None:
    """Why the instruction set of DLVAE_CPU is unavailable; None if it is available, or without the C++ library.

    Raises:
        ValueError: DLVAE_CPU is not an instruction set.
    """
    name = os.environ.get("DLVAE_CPU")
    if not name or library_unavailable_reason() is not None or name in instruction_sets():
        return None
    if name in instruction_sets(everywhere=True):
        return f"DLVAE_CPU is {name!r}, which this processor lacks; it has {', '.join(instruction_sets())}"
    raise ValueError(
        f"expected DLVAE_CPU to be one of {', '.join(instruction_sets(everywhere=True))}, or unset, got {name!r}"
    )


def cuda_unavailable_reason() -> str | None:
    """Why the CUDA kernels are unavailable on this machine, or None."""
    return _load_cuda() if torch.cuda.is_available() else "torch finds no CUDA device"


@functools.cache
def _cuda_operation_unavailable_reason(op: str, device: torch.device) -> str | None:
    if (reason := _load_cuda()) is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dlvae_native::{op}", "CUDA"):
        return f"the CUDA C++ library has no kernel for {op}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_GPU:
        oldest, found = (f"{major}.{minor}" for major, minor in (_OLDEST_GPU, capability))
        return f"compute capability {oldest} or newer is required, {device} has {found}"
    return None


def unavailable_reason(op: str, *args: Any) -> str | None:
    """Why this backend is unavailable for `op` on `args`, or None.

    Raises:
        ValueError: DLVAE_CPU is not an instruction set.
    """
    if (reason := library_unavailable_reason()) is not None:
        return reason
    if not hasattr(torch.ops.dlvae_native, op):
        return f"the C++ library has no kernel for {op}"
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "cuda"):
            return f"it runs on the CPU and on CUDA, and the tensors are on {tensor.device.type}"
        if tensor.dtype not in _TYPES and not (tensor.dtype == torch.bool and op in _MASKED):
            return f"it has no kernel for {tensor.dtype}"
    if tensors and tensors[0].device.type == "cuda":
        if op == "topk_codes" and len(args) > 2 and args[2] > _MOST_SELECTED:
            return f"topk_codes on CUDA supports k <= {_MOST_SELECTED}, got {args[2]}"
        return _cuda_operation_unavailable_reason(op, tensors[0].device)
    return instruction_set_unavailable_reason()


def __getattr__(name: str) -> Any:
    if name.startswith("_") or library_unavailable_reason() is not None or not hasattr(torch.ops.dlvae_native, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The builtin function under the operation: the Python wrapper around it takes 1 us.
    return getattr(torch.ops.dlvae_native, name).default._op

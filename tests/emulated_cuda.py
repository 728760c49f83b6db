"""The CUDA kernels as functions of the CPU, which `make cuda-emulated` builds: a backend for tests alone."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "build" / "cuda-emulated" / "native_cuda_emulated.so"
HAS_COMPILER = shutil.which("make") is not None and shutil.which("g++") is not None
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool)


def make(*words: str) -> subprocess.CompletedProcess:
    """Run make in the checkout, one at a time: tests in several processes share what it builds."""
    (ROOT / "build").mkdir(exist_ok=True)
    command = ["make", "-j2", f"PYTHON={sys.executable}", *words]
    with open(ROOT / "build" / "tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result


class EmulatedCuda(ModuleType):
    def __init__(self, library: str) -> None:
        super().__init__("emulated")
        torch.ops.load_library(library)

    def unavailable_reason(self, op: str, *args: Any) -> str | None:
        """Why it cannot run `op` on `args`; None if it can."""
        name = f"dlvae_emulated::{op}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            return "there is no CUDA kernel for it"
        for arg in args:
            if isinstance(arg, torch.Tensor) and (arg.device.type != "cpu" or arg.dtype not in _TYPES):
                return f"it has no kernel for {arg.dtype} on {arg.device.type}"
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(torch.ops.dlvae_emulated, name)

"""The Triton backend: the main path for CUDA tensors, or the reason why it cannot run."""

from __future__ import annotations

import importlib.util
from typing import Any


def why_not(op: str, *args: Any) -> str | None:
    """Why this backend cannot run `op` on `args`; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if op not in globals():
        return f"this version has no Triton kernel for {op} (it is not written yet)"
    return None

"""The compiled backend: finds the library built from csrc, or keeps the reason why there is none."""

from __future__ import annotations

from typing import Any


def why_not(op: str, *args: Any) -> str | None:
    """Why this backend cannot run `op`: this version carries no C++ or CUDA C++ kernels."""
    return f"this version has no compiled kernel for {op} (csrc is not written yet)"

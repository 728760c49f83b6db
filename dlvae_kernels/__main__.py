"""`python -m dlvae_kernels`: which backend is available for which operation, and why the others are unavailable."""

from __future__ import annotations

import torch

from .backends import BACKENDS, backend_info, forced_backend, native


def main() -> None:
    info = backend_info()
    width = max(map(len, info))
    print(f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}")
    print(f"instruction set of the C++ kernels: {_instruction_set()}")
    print(f"CUDA kernels of the native backend: {_availability(native.cuda_unavailable_reason())}")
    print(f"forced backend: {forced_backend() or 'none'}\n")
    print(" " * width, *(f"{backend:10}" for backend in BACKENDS))
    for op, reasons in info.items():
        print(f"{op:{width}}", *(f"{'available' if reason is None else 'no':10}" for reason in reasons.values()))
    print()
    for backend in BACKENDS:
        lacks: dict[str, list[str]] = {}
        for op, reasons in info.items():
            if (reason := reasons[backend]) is not None:
                lacks.setdefault(reason, []).append(op)
        for reason, ops in lacks.items():
            print(f"{backend}, {'all' if len(ops) == len(info) else ', '.join(ops)}: {reason}")


def _availability(reason: str | None) -> str:
    return "available" if reason is None else f"unavailable: {reason}"


def _instruction_set() -> str:
    if not native.instruction_sets():
        return "none"
    used = native.instruction_set()
    others = [name for name in native.instruction_sets() if name != used]
    return f"{used} (DLVAE_CPU can select {', '.join(others)})" if others else used


if __name__ == "__main__":
    main()

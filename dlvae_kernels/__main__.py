"""`python -m dlvae_kernels`: which backend can run which operation here, and why the others cannot."""

from __future__ import annotations

import torch

from .backends import BACKENDS, backend_info, forced_backend


def main() -> None:
    info = backend_info()
    width = max(map(len, info))
    print(f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}")
    print(f"forced backend: {forced_backend() or 'none'}\n")
    print(" " * width, *(f"{backend:10}" for backend in BACKENDS))
    for op, reasons in info.items():
        print(f"{op:{width}}", *(f"{'available' if reason is None else 'no':10}" for reason in reasons.values()))
    print()
    for op, reasons in info.items():
        for backend, reason in reasons.items():
            if reason is not None:
                print(f"{op}, {backend}: {reason}")


if __name__ == "__main__":
    main()

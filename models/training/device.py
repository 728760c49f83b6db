"""The device and the precision of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of this name, which becomes the current one; "auto" is the GPU if there is one.

    If several ranks train on this machine, `local_rank` selects the GPU of this one.

    Raises:
        ValueError: the device does not exist or cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and local_rank is not None:
            device = _gpu_of_rank(device, local_rank)
        # Only now: without an index, every rank would allocate memory on the first GPU.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected device to be usable on this machine, got {name!r}: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected device to be cpu, cuda, cuda:N or auto, got {name!r}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _gpu_of_rank(device: torch.device, local_rank: int) -> torch.device:
    if device.index is not None:
        raise ValueError(f"expected device to be cuda for several ranks, each with its own GPU, got {str(device)!r}")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"expected a GPU for each rank of this machine, got {torch.cuda.device_count()} for at least"
            f" {local_rank + 1} ranks; pass a smaller --nproc-per-node to torchrun, or train with --device cpu"
        )
    return torch.device("cuda", local_rank)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass; "auto" is bfloat16 autocast if the hardware computes in bfloat16."""
    in_bfloat16 = precision == "bfloat16"
    if precision == "auto" and device.type == "cuda":
        in_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision == "auto":
        in_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if in_bfloat16 else nullcontext()

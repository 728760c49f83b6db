"""The memory that a model needs, from its configuration alone."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .build import build_model
from .config import Config

_FLOAT_BYTES = 4
# Weights, their gradients and the two moments of Adam.
_COPIES_IN_TRAINING = 4
_LIMIT_OF_GROUP = Path("/sys/fs/cgroup/memory.max")


def check_memory(config: Config, device: torch.device, metrics_rows: int | None = None) -> None:
    """Check that the model fits into the memory of the device.

    Args:
        metrics_rows: for training, the number of updates whose metrics the device keeps; gradients and optimizer state
            are then counted too.
    Raises:
        ValueError: it does not fit.
    """
    needed, present = needed_bytes(config, metrics_rows), present_bytes(device)
    if needed is None or needed > present:
        size = "more bytes than 64 bits can count" if needed is None else f"at least {needed / 2**30:,.1f} GiB"
        raise ValueError(
            f"the model needs {size}, {device} has {present / 2**30:,.1f} GiB; lower num_embeddings"
            f" ({config.num_embeddings}), embedding_dim ({config.embedding_dim}), hiddens ({config.hiddens}),"
            f" residual_hiddens ({config.residual_hiddens}) or residual_layers ({config.residual_layers})"
        )


def needed_bytes(config: Config, metrics_rows: int | None = None) -> int | None:
    """Bytes of weights and buffers, in training also of gradients, optimizer state and metrics; see `check_memory`.

    Activations and images are not counted. None where 64 bits cannot count the bytes of a tensor.
    """
    try:
        with torch.device("meta"):
            model = build_model(config, in_channels=3)
    except RuntimeError:
        return None
    buffers = sum(each.numel() for each in model.buffers())
    parameters = sum(each.numel() for each in model.parameters())
    if metrics_rows is None:
        return _FLOAT_BYTES * (buffers + parameters)
    return _FLOAT_BYTES * (buffers + _COPIES_IN_TRAINING * parameters + metrics_rows * (2 + config.num_embeddings))


def present_bytes(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine as far as this process may use it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(_LIMIT_OF_GROUP.read_text()))
    except (OSError, ValueError):  # no limit
        return machine

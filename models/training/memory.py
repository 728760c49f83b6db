"""The memory that a model needs, computed from its configuration."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..build import build_model
from .config import Config
from .step import NUM_MEANS

_FLOAT_BYTES = 4
# The weights, their gradients and the two moments of Adam.
_COPIES_IN_TRAINING = 4
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(config: Config, device: torch.device, metrics_rows: int | None = None) -> None:
    """Check that the model fits into the memory of the device.

    Args:
        metrics_rows: for training, the number of updates whose metrics the device keeps; gradients and optimizer state
            are then counted too.
    Raises:
        ValueError: the model does not fit.
    """
    needed, available = needed_bytes(config, metrics_rows), available_bytes(device)
    if needed is None or needed > available:
        size = "more than 2^63 bytes" if needed is None else f"at least {needed / 2**30:,.1f} GiB"
        raise ValueError(
            f"the model needs {size}, and {device} has {available / 2**30:,.1f} GiB; lower num_embeddings"
            f" ({config.num_embeddings}), embedding_dim ({config.embedding_dim}), hiddens ({config.hiddens}),"
            f" residual_hiddens ({config.residual_hiddens}) or residual_layers ({config.residual_layers})"
        )


def needed_bytes(config: Config, metrics_rows: int | None = None) -> int | None:
    """Bytes of weights and buffers, and in training of gradients, optimizer state and metrics; see `check_memory`.

    Activations and images are not counted. None if the size of a tensor overflows 64 bits.
    """
    try:
        with torch.device("meta"):
            model = build_model(config, in_channels=3)
    except RuntimeError:
        return None
    buffers = sum(each.nbytes for each in model.buffers())
    parameters = sum(each.numel() for each in model.parameters())
    if metrics_rows is None:
        return buffers + _FLOAT_BYTES * parameters
    metrics = metrics_rows * (NUM_MEANS + config.num_embeddings)
    return buffers + _FLOAT_BYTES * (_COPIES_IN_TRAINING * parameters + metrics)


def available_bytes(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine up to the limit of the control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # there is no limit
        return machine

"""From a configuration to a model, a device and a precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .autoencoder import Autoencoder
from .config import Config
from .dlvae import DictionaryLearningVAE
from .vqvae import VQVAE


def build_model(config: Config, in_channels: int) -> Autoencoder:
    sizes = (
        config.hiddens,
        config.residual_layers,
        config.residual_hiddens,
        config.num_embeddings,
        config.embedding_dim,
    )
    if config.model == "dlvae":
        return DictionaryLearningVAE(
            *sizes, config.sparsity, config.sparsity_level, in_channels=in_channels, gradient=config.gradient
        )
    return VQVAE(
        *sizes,
        config.commitment_cost,
        config.decay if config.model == "vqvae-ema" else 0,
        in_channels=in_channels,
        init=config.init,
        dead_code_threshold=config.dead_code_threshold,
    )


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one. From now on what names no GPU goes to this one.

    Of several ranks on a machine, each with its `local_rank`, each has a GPU of its own.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and local_rank is not None:
            device = _own_gpu(device, local_rank)
        # Not before: it would make every rank take memory of the first GPU.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; it needs to be cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _own_gpu(device: torch.device, local_rank: int) -> torch.device:
    if device.index is not None:
        raise ValueError(f"device is {str(device)!r}; several ranks need cuda, which gives each its own")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device is {str(device)!r}, of which there are {torch.cuda.device_count()} here, fewer than ranks;"
            " give torchrun a smaller --nproc-per-node, or train with --device cpu"
        )
    return torch.device("cuda", local_rank)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward: bfloat16 autocast where asked for, or where the machine computes in it."""
    if config.precision == "auto":
        if device.type == "cuda":
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    else:
        has_bfloat16 = config.precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if has_bfloat16 else nullcontext()

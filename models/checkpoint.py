"""Checkpoints: all that a run needs to go on, in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_MODEL, _OPTIMIZER, _RNG = "model.", "optimizer.", "rng."


def save_weights(path: Path, model: nn.Module) -> None:
    """The state_dict of the model alone.

    Raises:
        OSError: it cannot be written; a file that was there before is as it was.
    """
    _save(path, dict(model.state_dict()), {})


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Weights, optimizer state, random states and `progress` (JSON: the number of updates done, seconds, ...).

    Raises:
        OSError: it cannot be written; a file that was there before is as it was.
    """
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state[parameter].items():
            tensors[f"{_OPTIMIZER}{index}.{name}"] = value
    tensors[_RNG + "cpu"] = torch.get_rng_state()
    if (device := _parameters(optimizer)[0].device).type == "cuda":
        tensors[_RNG + "cuda"] = torch.cuda.get_rng_state(device)
    _save(path, tensors, {"progress": json.dumps(progress)})


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what `save` wrote; returns the progress.

    Raises:
        ValueError: the file is not a whole checkpoint of a run.
    """
    tensors, progress = _read(path)
    model.load_state_dict(_below(tensors, _MODEL))
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in _below(tensors, f"{_OPTIMIZER}{index}.").items():
            # In the layout of the parameter, so that the next step rounds the same way.
            like = parameter if value.shape == parameter.shape else value
            restored = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            optimizer.state[parameter][name] = restored.copy_(value)
    torch.set_rng_state(tensors[_RNG + "cpu"])
    if (device := _parameters(optimizer)[0].device).type == "cuda" and _RNG + "cuda" in tensors:
        torch.cuda.set_rng_state(tensors[_RNG + "cuda"], device)
    return progress


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Restore the weights alone, of `save`; returns the progress.

    Raises:
        ValueError: the file is not a whole checkpoint of a run.
    """
    tensors, progress = _read(path)
    model.load_state_dict(_below(tensors, _MODEL))
    return progress


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            return {name: file.get_tensor(name) for name in file.keys()}, progress  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of a run ({error!r})") from error


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_suffix(".partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error})") from error
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)

"""Checkpoints: the complete state of a run in one safetensors file, written atomically."""

from __future__ import annotations

import json
import shlex
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import replacing

_MODEL, _BUFFER, _OPTIMIZER, _RNG = "model.", "buffer.", "optimizer.", "rng."
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the state_dict of the model.

    Raises:
        OSError: the file cannot be written; the previous file is unchanged.
    """
    _save(path, dict(model.state_dict()), {})


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Write weights, optimizer state, random states, `progress` ({"update": int, "seconds": float}) and a checksum.

    The buffers that are not in the state_dict of the model, such as the use of the codes, are written as well.

    Raises:
        OSError: the file cannot be written; the previous file is unchanged.
    """
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    tensors |= {_BUFFER + name: tensor for name, tensor in _unsaved_buffers(model).items()}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state[parameter].items():
            tensors[f"{_OPTIMIZER}{index}.{name}"] = value
    tensors[_RNG + "cpu"] = torch.get_rng_state()
    if (device := _parameters(optimizer)[0].device).type == "cuda":
        tensors[_RNG + "cuda"] = torch.cuda.get_rng_state(device)
    tensors = _on_host(tensors)
    text = json.dumps(progress)
    _save(path, tensors, {"progress": text, "checksum": checksum(tensors, text)})


def load(path: Path, model: nn.Module, optimizer: torch.optim.Adam) -> dict[str, Any]:
    """Restore the state that `save` wrote; returns the progress.

    Raises:
        ValueError: the file is not a valid checkpoint of this run; model, optimizer and random states are unchanged.
    """
    device = (parameters := _parameters(optimizer))[0].device
    tensors, progress = _checked(path, model, parameters)
    model.load_state_dict(_below(tensors, _MODEL))
    for name, value in _below(tensors, _BUFFER).items():
        model.get_buffer(name).copy_(value)
    for index, parameter in enumerate(parameters):
        for name, value in _below(tensors, f"{_OPTIMIZER}{index}.").items():
            # In the memory layout of the parameter, so that the next step rounds in the same way.
            like = parameter if value.shape == parameter.shape else value
            restored = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            optimizer.state[parameter][name] = restored.copy_(value)
    torch.set_rng_state(tensors[_RNG + "cpu"])
    if device.type == "cuda" and _RNG + "cuda" in tensors:
        torch.cuda.set_rng_state(tensors[_RNG + "cuda"], device)
    return progress


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Restore only the weights that `save` wrote, after a check of the whole file; returns the progress.

    Raises:
        ValueError: the file is not a valid checkpoint of this run; the model is unchanged.
    """
    tensors, progress = _checked(path, model, list(model.parameters()))
    model.load_state_dict(_below(tensors, _MODEL))
    return progress


def remove_partial(folder: Path) -> None:
    """Remove the temporary files of a killed safetensors from a folder to which no other process writes checkpoints."""
    for partial in folder.glob(".tmp??????"):
        partial.unlink(missing_ok=True)


def checksum(tensors: dict[str, Tensor], progress: str) -> str:
    """CRC-32 of the progress and of the names, dtypes, shapes and bytes of tensors, which are contiguous on the CPU."""
    crc = zlib.crc32(progress.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode(), crc)
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, crc)
    return f"crc32:{crc:08x}"


class _BrokenError(Exception):
    """The reason why a file is not a valid checkpoint of this run."""


def _checked(path: Path, model: nn.Module, parameters: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the progress of a file, after all checks; `parameters` are those of the optimizer."""
    try:
        tensors, metadata = _read(path)
        if "checksum" not in metadata:
            raise _BrokenError("it has no checksum: another program or an earlier version wrote it")
        progress = _progress(metadata.get("progress"))
        _check_entries(_below(tensors, _MODEL), dict(model.state_dict()), _MODEL)
        # An earlier version wrote none: then they begin anew.
        if buffers := _below(tensors, _BUFFER):
            _check_entries(buffers, _unsaved_buffers(model), _BUFFER)
        _check_optimizer(_below(tensors, _OPTIMIZER), parameters)
        _check_random_states(_below(tensors, _RNG), parameters[0].device)
        if strange := [name for name in tensors if not name.startswith((_MODEL, _BUFFER, _OPTIMIZER, _RNG))]:
            raise _BrokenError(f"entry {_one_line(strange[0])} is unknown")
        if (actual := checksum(tensors, metadata["progress"])) != metadata["checksum"]:
            raise _BrokenError(f"its content has the checksum {actual}, expected {metadata['checksum']}")
    except _BrokenError as error:
        raise ValueError(
            f"{path} is not a valid checkpoint of this run: {error}; restore it from a copy, or delete it and restart"
            f" the run with: python -m models.train --resume {shlex.quote(str(path.parent))}"
        ) from error
    return tensors, progress


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    # To open a pipe would block.
    if not path.is_file():
        raise _BrokenError("it is not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors and torch raise errors of many types for a broken header
        raise _BrokenError(f"it cannot be read ({type(error).__name__}: {_one_line(error)})") from error


def _progress(text: str | None) -> dict[str, Any]:
    try:
        progress = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise _BrokenError(f"its progress is not JSON ({_one_line(error)})") from error
    if not isinstance(progress, dict):
        raise _BrokenError("its progress is not a JSON object")
    update, seconds = progress.get("update"), progress.get("seconds")
    if type(update) is not int or not 0 <= update < 2**63:
        raise _BrokenError(
            f"expected the update of its progress to be an integer of at least 0, got {_one_line(update)}"
        )
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= sys.float_info.max:
        raise _BrokenError(
            f"expected the seconds of its progress to be a finite number of at least 0, got {_one_line(seconds)}"
        )
    return progress


def _check_entries(tensors: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> None:
    """Check names, shapes and dtypes, and that all numbers are finite."""
    if missing := [name for name in expected if name not in tensors]:
        raise _BrokenError(f"entry {_one_line(prefix + missing[0])} is missing")
    for name, tensor in tensors.items():
        entry = f"entry {_one_line(prefix + name)}"
        if name not in expected:
            raise _BrokenError(f"{entry} is unknown")
        like = expected[name]
        if tensor.shape != like.shape:
            raise _BrokenError(f"{entry} has shape {list(tensor.shape)}, expected {list(like.shape)}")
        if tensor.dtype != like.dtype:
            raise _BrokenError(f"{entry} has dtype {tensor.dtype}, expected {like.dtype}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _BrokenError(f"{entry} has values that are not finite")


def _check_optimizer(tensors: dict[str, Tensor], parameters: list[Tensor]) -> None:
    expected = {}
    for index, parameter in enumerate(parameters):
        expected[f"{index}.step"] = torch.empty((), dtype=torch.float32)
        expected |= {f"{index}.{moment}": parameter for moment in _MOMENTS}
    _check_entries(tensors, expected, _OPTIMIZER)
    for name, tensor in tensors.items():
        if name.endswith((".step", ".exp_avg_sq")) and (tensor < 0).any():
            raise _BrokenError(f"entry {_one_line(_OPTIMIZER + name)} has values below 0")


def _check_random_states(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Check that generators accept the states; the state of a GPU is optional, and is not checked without a GPU."""
    expected = {"cpu": torch.get_rng_state()}
    if "cuda" in tensors:
        expected["cuda"] = torch.empty(16, dtype=torch.uint8)  # a seed and an offset, 64 bits each
    _check_entries(tensors, expected, _RNG)
    for name, state in tensors.items():
        if name == "cuda" and device.type != "cuda":
            continue
        try:
            torch.Generator(device if name == "cuda" else "cpu").set_state(state)
        except RuntimeError as error:
            raise _BrokenError(
                f"entry '{_RNG}{name}' is not a state of a random generator ({_one_line(error)})"
            ) from error


def _one_line(value: object) -> str:
    """A value of a broken file for a message: one line of limited length."""
    try:
        text = ascii(value) if isinstance(value, str) else " ".join(str(value).split())
    except ValueError:  # an integer of thousands of digits
        text = "a number of too many digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not in the state_dict."""
    saved = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as (partial,):
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(_on_host(tensors), partial, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        # safetensors replaces the file by one that only its owner may read; the mode of the umask is restored.
        partial.chmod(mode)

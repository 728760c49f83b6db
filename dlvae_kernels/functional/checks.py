"""Checks of arguments: each raises a `ValueError` that names the argument, what was expected, and what it got.

All checks look only at shapes and types, so that `torch.compile` evaluates them while tracing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: Tensor) -> None:
    """Check for a dense tensor on a device that has float64."""
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise ValueError(f"expected {name} to be a torch.Tensor, got {kind}; pass torch.as_tensor({name})")
    if value.is_nested:
        raise ValueError(
            f"expected {name} to be a dense tensor, got a nested tensor; pass {name}.values() or a padded tensor"
        )
    if value.layout != torch.strided:
        raise ValueError(
            f"expected {name} to be a dense tensor, got one of layout {value.layout}; pass {name}.to_dense()"
        )
    if value.is_mps:
        raise ValueError(f"expected {name} on a device that has float64, got {value.device}; pass {name}.cpu()")


def check_floating(name: str, tensor: Tensor) -> None:
    """Check for a dense tensor of one of the four floating dtypes."""
    check_tensor(name, tensor)
    if tensor.dtype not in _FLOATING:
        raise ValueError(
            f"expected {name} of dtype float16, bfloat16, float32 or float64, got {tensor.dtype}; pass {name}.float()"
        )


def check_codebook(name: str, codebook: Tensor, *, heads: bool = False) -> None:
    """Check for a floating tensor [K, D] with K >= 1 and D >= 1, or where the operation takes heads also [H, K, D]."""
    check_floating(name, codebook)
    if codebook.ndim not in ((2, 3) if heads else (2,)) or 0 in codebook.shape:
        shapes = "[K, D] or [H, K, D] with H >= 1," if heads else "[K, D] with"
        remedy = "; this operation takes no heads" if codebook.ndim == 3 and not heads else ""
        raise ValueError(f"expected {name} of shape {shapes} K >= 1 and D >= 1, got {tuple(codebook.shape)}{remedy}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check that both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"expected {name} on the device of {other_name}, {other.device}, got {tensor.device};"
            f" pass {name}.to({other_name}.device)"
        )


def check_vectors(name: str, x: Tensor, codebook_name: str, codebook: Tensor, *, heads: bool = False) -> None:
    """Check that x [..., D] fits codebook [K, D]: one device and D, and a codebook of the dtype of x or float32.

    heads: the operation also takes x [..., H, D] and codebook [H, K, D].
    """
    check_floating(name, x)
    check_codebook(codebook_name, codebook, heads=heads)
    check_sizes(name, x, codebook_name, codebook)
    check_same_device(name, x, codebook_name, codebook)
    check_parameter_dtype(codebook_name, codebook, name, x)


def check_sizes(name: str, x: Tensor, codebook_name: str, codebook: Tensor) -> None:
    """Check for x [..., D] with the D of codebook [K, D], or for x [..., H, D] with both of codebook [H, K, D]."""
    if codebook.ndim == 3:
        if x.ndim < 2 or x.shape[-1] != codebook.shape[2] or x.shape[-2] != codebook.shape[0]:
            raise ValueError(
                f"expected {name} of shape [..., {codebook.shape[0]}, {codebook.shape[2]}], with the H and D of"
                f" {codebook_name} [H, K, D], got {tuple(x.shape)}"
            )
    elif x.ndim == 0 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"expected {name} of shape [..., {codebook.shape[1]}], with the D of {codebook_name}, got {tuple(x.shape)}"
        )


def check_codebooks(name: str, codebooks: Tensor) -> None:
    """Check for a floating tensor [L, K, D] with L, K and D >= 1."""
    check_floating(name, codebooks)
    if codebooks.ndim != 3 or 0 in codebooks.shape:
        raise ValueError(f"expected {name} of shape [L, K, D] with L, K and D >= 1, got {tuple(codebooks.shape)}")


def check_vectors_of_levels(name: str, x: Tensor, codebooks_name: str, codebooks: Tensor) -> None:
    """Check that x [..., D] fits codebooks [L, K, D]: one device and D, and codebooks of the dtype of x or float32."""
    check_floating(name, x)
    check_codebooks(codebooks_name, codebooks)
    if x.ndim == 0 or x.shape[-1] != codebooks.shape[2]:
        raise ValueError(
            f"expected {name} of shape [..., {codebooks.shape[2]}], with the D of {codebooks_name},"
            f" got {tuple(x.shape)}"
        )
    check_same_device(name, x, codebooks_name, codebooks)
    check_parameter_dtype(codebooks_name, codebooks, name, x)


def check_flags(name: str, flags: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor) -> None:
    """Check for a bool tensor of a shape, on the device of another tensor."""
    check_tensor(name, flags)
    if flags.dtype != torch.bool or flags.shape != shape:
        raise ValueError(
            f"expected {name} of shape {tuple(shape)} and dtype torch.bool, got {tuple(flags.shape)} and {flags.dtype}"
        )
    check_same_device(name, flags, other_name, other)


def check_bias(name: str, bias: Tensor, codebook_name: str, codebook: Tensor) -> None:
    """Check for one number for each code of codebook [K, D], of its dtype or float32."""
    check_floating(name, bias)
    if bias.shape != codebook.shape[:1]:
        raise ValueError(
            f"expected {name} of shape [{codebook.shape[0]}], with the K of {codebook_name}, got {tuple(bias.shape)}"
        )
    check_same_device(name, bias, codebook_name, codebook)
    check_parameter_dtype(name, bias, codebook_name, codebook)


def check_parameter_dtype(name: str, parameter: Tensor, other_name: str, other: Tensor) -> None:
    """Check that a parameter has the dtype of the other tensor, or float32 where the other has half precision."""
    if not _fits(parameter.dtype, other.dtype):
        raise ValueError(
            f"expected {name} of dtype {other.dtype}, as {other_name} has, or float32 if {other_name} has half"
            f" precision, got {parameter.dtype}; pass {name}.to({other_name}.dtype)"
        )


def check_layer_dtype(name: str, inputs: Tensor, parameter: Tensor) -> None:
    """Check that the inputs of a layer have the dtype of its parameter, or half precision for a float32 parameter."""
    check_floating(name, inputs)
    if not _fits(parameter.dtype, inputs.dtype):
        raise ValueError(
            f"expected {name} of the layer's dtype, {parameter.dtype}, or of half precision for a float32 layer,"
            f" got {inputs.dtype}; pass {name}.to({parameter.dtype}) or call .to({inputs.dtype}) on the layer"
        )


def _fits(parameter: torch.dtype, other: torch.dtype) -> bool:
    return parameter == other or (parameter == torch.float32 and other != torch.float64)


def check_indices(name: str, indices: Tensor) -> None:
    """Check for a dense int64 tensor; the operation itself checks the range, at run time."""
    check_tensor(name, indices)
    if indices.dtype != torch.int64:
        raise ValueError(f"expected {name} of dtype torch.int64, got {indices.dtype}; pass {name}.long()")


def check_indices_of(name: str, indices: Tensor, x_name: str, x: Tensor) -> None:
    """Check for one index for each vector of x [..., D]."""
    check_indices(name, indices)
    if indices.shape != x.shape[:-1]:
        raise ValueError(
            f"expected {name} of shape {tuple(x.shape[:-1])}, one for each vector of {x_name},"
            f" got {tuple(indices.shape)}"
        )
    check_same_device(name, indices, x_name, x)


def check_size(name: str, value: int, low: int, high: int | None = None) -> int:
    """Return `value` as a Python int: an integer, NumPy's included, of at least `low` and at most `high`."""
    try:
        # A SymInt stays symbolic; True and False are no sizes.
        size = value if isinstance(value, torch.SymInt) else operator.index(value)
    except TypeError:
        size = None
    if size is None or isinstance(value, bool) or size < low or (high is not None and size > high):
        bounds = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"expected {name} to be an integer {bounds}, got {value!r}")
    return size


def _is_true(comparison: Callable[[], bool]) -> bool:
    """Whether a comparison holds; it does not for a value that cannot be compared with numbers."""
    try:
        return bool(comparison())
    except TypeError:
        return False


def check_at_least(name: str, value: float, least: float) -> None:
    """Check that a number is at least `least`; NaN is not."""
    if not _is_true(lambda: value >= least):
        raise ValueError(f"expected {name} to be at least {least}, got {value!r}")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Check that a number lies in [low, high]; NaN does not."""
    if not _is_true(lambda: low <= value <= high):
        raise ValueError(f"expected {name} to lie in [{low}, {high}], got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a name is one of those that exist."""
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")

"""Checks of arguments. Each raises a `ValueError` that names the argument, what it got and what it needs.

All look at shapes and types alone, so that `torch.compile` evaluates them while tracing.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: Tensor) -> None:
    """A dense tensor on a device that has float64."""
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise ValueError(f"{name} is a {kind}; it needs to be a torch.Tensor: pass torch.as_tensor({name})")
    if value.is_nested:
        raise ValueError(f"{name} is a nested tensor; pass its rows, {name}.values(), or a padded tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has the layout {value.layout}; pass a dense tensor, {name}.to_dense()")
    if value.device.type == "mps":
        raise ValueError(f"{name} is on {value.device}, which has no float64; pass {name}.cpu()")


def check_floating(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in _FLOATING:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it needs float16, bfloat16, float32 or float64")


def check_codebook(name: str, codebook: Tensor) -> None:
    """[K, D], K >= 1."""
    check_floating(name, codebook)
    if codebook.ndim != 2 or codebook.shape[0] == 0 or codebook.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(codebook.shape)}; it needs [K, D] with K >= 1 and D >= 1")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}; it needs the device of {other_name}, {other.device}")


def check_rows(name: str, x: Tensor, codebook_name: str, codebook: Tensor) -> None:
    """x [..., D] goes with codebook [K, D]: same device and D, and the codebook has the dtype of x or float32."""
    check_floating(name, x)
    check_codebook(codebook_name, codebook)
    if x.ndim == 0 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it needs [..., D] with the D = {codebook.shape[1]} of {codebook_name}"
        )
    check_same_device(name, x, codebook_name, codebook)
    if codebook.dtype != x.dtype and (codebook.dtype != torch.float32 or x.dtype == torch.float64):
        raise ValueError(
            f"{codebook_name} has dtype {codebook.dtype}; it needs that of {name}, {x.dtype},"
            " or float32 beside a half-precision one"
        )


def check_bias(name: str, bias: Tensor, codebook_name: str, codebook: Tensor) -> None:
    """One number for each row of codebook [K, D]: its dtype, or float32 beside half precision."""
    check_floating(name, bias)
    if bias.shape != codebook.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(bias.shape)}; it needs [K] with the K = {codebook.shape[0]} of {codebook_name}"
        )
    check_same_device(name, bias, codebook_name, codebook)
    if bias.dtype != codebook.dtype and (bias.dtype != torch.float32 or codebook.dtype == torch.float64):
        raise ValueError(
            f"{name} has dtype {bias.dtype}; it needs that of {codebook_name}, {codebook.dtype},"
            " or float32 beside a half-precision one"
        )


def check_indices(name: str, indices: Tensor) -> None:
    """Their range is checked by the operation itself, at run time."""
    check_tensor(name, indices)
    if indices.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {indices.dtype}; it needs int64")


def check_row_indices(name: str, indices: Tensor, x_name: str, x: Tensor) -> None:
    """One index for each row of x [..., D]."""
    check_indices(name, indices)
    if indices.shape != x.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(indices.shape)}; it needs {tuple(x.shape[:-1])}, the rows of {x_name}"
        )
    check_same_device(name, indices, x_name, x)


def check_size(name: str, value: int, low: int, high: int | None = None) -> int:
    """`value` as a Python int: a whole number, NumPy's included, of at least `low` and at most `high`."""
    try:
        # A SymInt stays symbolic; True and False are no sizes.
        size = value if isinstance(value, torch.SymInt) else operator.index(value)
    except TypeError:
        size = None
    if size is None or isinstance(value, bool) or size < low or (high is not None and size > high):
        bounds = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} is {value!r}; it needs to be a whole number {bounds}")
    return size


def check_at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} is {value}; it needs to be at least {least}")


def check_between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it needs to lie in [{low}, {high}]")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it needs to be one of {', '.join(map(repr, choices))}")

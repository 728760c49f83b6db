"""Compares a quantizer with that of vector-quantize-pytorch: outputs, gradients and state, in two steps and in eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

LEARNING_RATE = 0.05


def copy_state(stock: nn.Module, own: nn.Module) -> None:
    """Load the state of each module into the other, strictly; names, shapes and dtypes must be equal."""
    expected, actual = stock.state_dict(), own.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in actual.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    own.load_state_dict(expected, strict=True)
    stock.load_state_dict(own.state_dict(), strict=True)


def compare(
    stock: nn.Module,
    own: nn.Module,
    inputs: Sequence[Tensor],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    requires_grad: bool = True,
    **options: Any,
) -> None:
    """Train both modules from the state of the stock one by a step on each input, then compare them in eval mode.

    The random numbers of every forward begin with the same seed.
    """
    copy_state(stock, own)
    stock.train()
    own.train()
    for step, x in enumerate(inputs):
        results = [_step(module, x, step, requires_grad, options) for module in (stock, own)]
        _assert_close(results, f"training step {step}", rtol, atol)
        states = [dict(module.state_dict()) for module in (stock, own)]
        _assert_close(states, f"state after training step {step}", rtol, atol)
    stock.eval()
    own.eval()
    for x in inputs:
        with torch.no_grad():
            outputs = [dict(enumerate(_tensors(module(x, **options)))) for module in (stock, own)]
        _assert_close(outputs, "eval", rtol, atol)


def check_only_own(check: Callable[[ModuleType], None], own: ModuleType, stock: ModuleType) -> None:
    """Run a check of what is mended: the compatibility package passes it, and vector-quantize-pytorch fails it."""
    check(own)
    with pytest.raises((AssertionError, AttributeError, RuntimeError)):
        check(stock)


def _step(
    module: nn.Module, x: Tensor, step: int, requires_grad: bool, options: dict[str, Any]
) -> dict[Any, Tensor | None]:
    """One step of gradient descent: the outputs of the module, and the gradients of input and parameters."""
    x = x.clone().requires_grad_(requires_grad)
    torch.manual_seed(step)
    outputs = _tensors(module(x, **options))
    generator = torch.Generator().manual_seed(step)
    total = x.new_zeros(())
    for output in outputs:
        if output.is_floating_point() and output.requires_grad:
            weights = torch.randn(output.shape, generator=generator) if output.ndim else 1
            total = total + (output * weights).sum()
    found: dict[Any, Tensor | None] = {f"output {i}": output for i, output in enumerate(outputs)}
    if total.requires_grad:
        total.backward()
    found["gradient of the input"] = x.grad
    for name, parameter in module.named_parameters():
        found[f"gradient of {name}"] = parameter.grad
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
    return found


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output if part is not None for tensor in _tensors(part)]


def _assert_close(pair: Sequence[dict[Any, Tensor | None]], where: str, rtol: float, atol: float) -> None:
    expected, actual = pair
    assert actual.keys() == expected.keys(), where
    for name, value in expected.items():
        text = f"{where}, {name}"
        # A gradient of zeros may be None.
        first = torch.zeros_like(actual[name]) if value is None and actual[name] is not None else value
        second = torch.zeros_like(value) if actual[name] is None and value is not None else actual[name]
        if first is not None:
            assert_close(second, first, rtol=rtol, atol=atol, msg=lambda message, text=text: f"{text}: {message}")

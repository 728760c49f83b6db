"""How an operation gets its gradient, and when autograd follows a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether reverse-mode or forward-mode autograd follows an operation on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    # torch.func.jvp opens a level too.
    return forward_ad._current_level >= 0


def gradient_of(
    name: str,
) -> Callable[[type[torch.autograd.Function]], type[torch.autograd.Function]]:
    """Register the decorated Function as the gradient of `dlvae::<name>`, which its forward calls.

    See `differentiable` for when autograd uses the operation, and when the Function.
    """

    def register(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        # `apply` binds its arguments to this signature; looking it up at each call costs four times as much.
        function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
        ops.register_autograd(name, function.backward, function.setup_context)
        return function

    return register


def differentiable(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call the operation of a Function so that autograd follows it.

    The operation itself has the gradient of reverse mode, in eager code and in graphs. Forward mode and torch.func
    need the Function, which takes 7 us more a call.
    """
    needs_function = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    return function.apply(*args) if needs_function and not torch.compiler.is_compiling() else function.forward(*args)


def no_forward_mode(name: str) -> NoReturn:
    """Raise for a function without a forward-mode derivative."""
    raise NotImplementedError(
        f"{name} has no forward-mode derivative; use reverse mode: torch.autograd.grad, torch.func.grad, torch.func.vjp"
    )


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all elements of a * b: a scalar, in at least float32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(dtype) * b.to(dtype)).sum()

"""How an operation gets its gradient, and when autograd follows a call."""

from __future__ import annotations

import functools
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


class _SecondDerivative(torch.autograd.Function):
    """A gradient unchanged, whose own derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(f"{ctx.name} has no second derivative; call backward without create_graph=True")

    @staticmethod
    def jvp(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(f"{ctx.name} has no second derivative; take its first by torch.autograd.grad")


# Stands for inputs that a backward does not save, so that its gradients require a gradient.
_LEAF = torch.empty(0, requires_grad=True)


def inputs_of_func(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs under a transform of torch.func, for `ctx.save_for_backward`; none elsewhere.

    There, a gradient depends on an input if the input is among the saved tensors of `once_differentiable`.
    """
    return inputs if torch._C._are_functorch_transforms_active() else ()


def once_differentiable(name: str, *, saves_inputs: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the backward of `name`, so that differentiating its gradients raises, unless they are constants.

    torch's decorator of this name looks at incoming gradients alone: where these are constants and the gradient depends
    on inputs, the second derivative would silently be zero. Here, it also depends on saved tensors that require a
    gradient, and without `saves_inputs` on inputs that are not saved.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> Any:
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return results
            depends_on = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
            if not depends_on and not saves_inputs:
                depends_on = [_LEAF]
            if not depends_on:
                return results
            return tuple(
                _SecondDerivative.apply(name, result, *depends_on) if isinstance(result, Tensor) else result
                for result in (results if isinstance(results, tuple) else (results,))
            )

        return run

    return decorate


def no_forward_mode(name: str) -> NoReturn:
    """Raise for a function without a forward-mode derivative."""
    raise NotImplementedError(
        f"{name} has no forward-mode derivative; use reverse mode: torch.autograd.grad, torch.func.grad, torch.func.vjp"
    )


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all elements of a * b: a scalar, in at least float32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(dtype) * b.to(dtype)).sum()

"""Calls: functions bound to their inputs, with the backward pass and with what the judge takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlvae_kernels.backends import native, use_backend

from .inputs import Inputs

Tensors = tuple[Tensor, ...]


class MissingError(Exception):
    """An implementation cannot run on this machine; the message is the reason."""


def needs(device: str, inputs: Inputs) -> None:
    """Raise MissingError unless the inputs are on this type of device."""
    if inputs.x.device.type != device:
        raise MissingError("needs a CUDA device" if device == "cuda" else "runs on the CPU only")


def _as_tuple(out: Any) -> Tensors:
    return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True)
class Call:
    """An implementation with its inputs. `forward` and `backward` are timed; `answer` and `gradients` are not."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Tensors] | None = None  # takes the result of forward; None: no gradient
    answer: Callable[[Any], Tensors] = _as_tuple  # converts the result of forward for the judge
    gradients: Callable[[Any], Tensors] = _as_tuple  # converts the result of backward for the judge

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.backward else ("forward",)

    def run(self, name: str) -> None:
        """Run the forward pass, or with the name "backward" both passes."""
        out = self.forward()
        if self.backward and name == "backward":
            self.backward(out)

    def judged(self) -> tuple[Tensors, Tensors]:
        """The answer and the gradients (none without a backward pass) of one run."""
        out = self.forward()
        answer = self.answer(out)
        return answer, self.gradients(self.backward(out)) if self.backward else ()


Prepare = Callable[[Inputs], Call]


def differentiable(
    forward: Callable[[], Any],
    learned: Sequence[Tensor],
    gradient: Tensor,
    outputs: Callable[[Any], Tensors] = _as_tuple,
    answer: Callable[[Any], Tensors] | None = None,
    gradients: Callable[[Any], Tensors] = _as_tuple,
) -> Call:
    """A call whose backward pass computes the gradients of the tensors `learned`.

    Args:
        gradient: the gradient of each of `outputs` that is no scalar. A scalar output is a loss, with the gradient 1.
        outputs: selects the outputs to differentiate from the result of `forward`.
        answer: selects what the judge takes; None: `outputs`.
    """

    def backward(out: Any) -> Tensors:
        chosen = outputs(out)
        seeds = [torch.ones_like(each) if each.ndim == 0 else gradient.to(each.dtype) for each in chosen]
        return torch.autograd.grad(chosen, learned, seeds)

    return Call(forward, backward, lambda out: tuple(each.detach() for each in (answer or outputs)(out)), gradients)


def in_cuda_cpp(prepare: Prepare, inputs: Inputs) -> Call:
    """This library with its compiled CUDA C++ kernels."""
    needs("cuda", inputs)
    if (reason := native.cuda_unavailable_reason()) is not None:
        raise MissingError(reason)

    def forced(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with use_backend("native"):
                return function(*args)

        return run

    call = prepare(inputs)
    return Call(forced(call.forward), forced(call.backward) if call.backward else None, call.answer, call.gradients)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for one set of shapes. Without the reset, the recompilation limit would end compilation."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)

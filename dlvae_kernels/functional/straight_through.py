from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from .checks import check_floating, check_indices_of, check_same_device
from .gradients import inputs_of_func, once_differentiable


class StraightThroughOutput(NamedTuple):
    """The result of `straight_through`, which describes the fields."""

    decoded: Tensor
    decoded_loss: Tensor
    x_loss: Tensor


class _StraightThrough(torch.autograd.Function):
    """Fused backward; composed PyTorch operations would dominate the step time outside the kernels."""

    @staticmethod
    def forward(x: Tensor, decoded: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # The residual has the wider dtype, at least float32 as coefficients have, and the strides of x.
        residual = x - decoded
        loss = _mean_of_squares(residual)
        # The output is a copy, because the caller may change it in place.
        return decoded.clone(), loss, loss.clone(), residual

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        x, decoded, indices = inputs
        *_, residual = output
        ctx.save_for_backward(residual, indices, *inputs_of_func(x, decoded))
        ctx.mark_non_differentiable(residual)
        ctx.dtype = x.dtype
        # An output that is not differentiated has the gradient None, and so may x and decoded.
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("straight_through", saves_inputs=False)
    def backward(
        ctx: Any, grad: Tensor | None, grad_decoded_loss: Tensor | None, grad_x_loss: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        residual, indices, *_ = ctx.saved_tensors
        need_x, need_decoded, _ = ctx.needs_input_grad
        slope = 2 / max(1, residual.numel())
        grad_x, grad_decoded = grad, None
        if need_x and grad is None and grad_x_loss is not None:
            grad_x = residual * (grad_x_loss * slope)
        elif need_x and grad_x_loss is not None:
            # This is the backward of a quantizer whose codes are the decoded vectors. That operation saves half of
            # decoded - x, and the residual is x - decoded: hence the factor -0.5.
            grad_loss = -0.5 * grad_x_loss
            grad_x, _ = torch.ops.dlvae.vector_quantize_bwd(
                grad, grad_loss, grad_loss, residual, indices, 1, 1, True, False
            )
        if need_decoded and grad_decoded_loss is not None:
            grad_decoded = residual * (grad_decoded_loss * -slope)
        return grad_x.to(ctx.dtype) if need_x and grad_x is not None else None, grad_decoded, None


def _mean_of_squares(residual: Tensor) -> Tensor:
    """The mean in the dtype of the residual, finite where only the sum would overflow."""
    count = max(1, residual.numel())
    if residual.is_cpu and type(residual) is Tensor and not torch.compiler.is_compiling():
        # A norm in float64 takes the CPU ten times as long, so it is used only if the float32 sum overflows.
        mean = torch.linalg.vector_norm(residual).square() / count
        if mean < float("inf"):
            return mean
    return (torch.linalg.vector_norm(residual, dtype=torch.float64).square() / count).to(residual.dtype)


def straight_through(x: Tensor, decoded: Tensor, indices: Tensor) -> StraightThroughOutput:
    """Pass the gradient of decoded vectors to x unchanged, and give each side a mean squared error to learn by.

    Args:
        x: [..., D] float16, bfloat16, float32 or float64, any strides.
        decoded: [..., D], same shape and device: the reconstruction of x.
        indices: [...] int64, same device: one index for each vector of x, which the kernel of the backward requires. A
            vector with the index -1 (no code) has no gradient; no result depends on other values. Pass for example
            `torch.zeros(x.shape[:-1], dtype=torch.int64)`.
    Returns:
        decoded: [..., D], a copy of `decoded`; its gradient goes to x unchanged, and not to `decoded`.
        decoded_loss, x_loss: scalars, at least float32: both are the mean of (x - decoded)^2 over all elements. The
        gradient of the first goes only to `decoded`, that of the second only to x.
    Raises:
        ValueError: shape, dtype or device do not fit.

    >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> out = straight_through(x, torch.tensor([[2.0, 4.0]]), torch.tensor([0]))
    >>> out.decoded.tolist(), float(out.x_loss.detach())
    ([[2.0, 4.0]], 2.5)
    >>> torch.autograd.grad(out.decoded.sum() + out.x_loss, x)[0].tolist()
    [[0.0, -1.0]]

    Source: Bengio et al. 2013, arXiv:1308.3432 (estimator); van den Oord et al. 2017, arXiv:1711.00937, eq. 3 (losses).
    """
    check_floating("x", x)
    check_floating("decoded", decoded)
    if x.ndim == 0 or decoded.shape != x.shape:
        raise ValueError(
            f"expected x and decoded of one shape [..., D], got {tuple(x.shape)} and {tuple(decoded.shape)}"
        )
    check_same_device("decoded", decoded, "x", x)
    check_indices_of("indices", indices, "x", x)
    if not torch.compiler.is_exporting():
        straight, decoded_loss, x_loss, _ = _StraightThrough.apply(x, decoded, indices)
        return StraightThroughOutput(straight, decoded_loss, x_loss)
    # An exported graph holds operations and no Functions: there, detached tensors give the same gradients.
    detached_x, detached_decoded = x.detach(), decoded.detach()
    straight = detached_decoded + (x - detached_x)
    return StraightThroughOutput(
        straight, mse_loss(decoded, detached_x.to(decoded.dtype)), mse_loss(x.to(decoded.dtype), detached_decoded)
    )

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .checks import check_floating, check_parameter_dtype, check_same_device
from .gradients import is_differentiated, once_differentiable


class _RotationTrick(torch.autograd.Function):
    """Copies q; the gradient is that of a rotation of x which is taken to be constant.

    torch.compile does not trace a Function with a forward mode, which `_WithForwardMode` adds.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, q: Tensor) -> Tensor:
        # The output is a copy, because the caller may change it in place.
        return q.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("rotation_trick")
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None or not ctx.needs_input_grad[0]:
            return None, None
        return torch.ops.dlvae.rotation_trick_bwd(grad, *ctx.saved_tensors), None


class _WithForwardMode(_RotationTrick):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _RotationTrick.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, _: Tensor | None) -> Tensor:
        x, q = ctx.saved_tensors
        return torch.zeros_like(q) if x_tangent is None else rotate_like(x_tangent, x, q).to(q.dtype)


def rotate_like(vectors: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """`vectors` rotated and scaled as x is to become q; [..., D] float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    vectors, x, q = vectors.to(dtype), x.to(dtype), q.to(dtype)
    source, target = normalize(x, dim=-1, eps=1e-6), normalize(q, dim=-1, eps=1e-6)
    between = source + target
    between = torch.where(between.norm(dim=-1, keepdim=True) < 1e-6, 0, normalize(between, dim=-1))
    rotated = vectors - 2 * (vectors * between).sum(-1, keepdim=True) * between
    rotated = rotated + 2 * (vectors * source).sum(-1, keepdim=True) * target
    return rotated * (q.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp(min=1e-6))


def rotation_trick(x: Tensor, q: Tensor) -> Tensor:
    """Replace x by its codes q, with the gradient of the rotation that takes x to q.

    The straight-through gradient moves all vectors of a code alike. This one is rotated by the angle between x and q
    and scaled by |q| / |x|: it keeps its angle to the vector. Rotation and scale count as constants:

        grad_x = |q| / |x| R^T grad,  R = I - 2 s s^T + 2 q' x'^T,
        x' = x / |x|,  q' = q / |q|,  s = (x' + q') / |x' + q'|

    Norms are divided by as if they were at least 1e-6. A code of zeros gives a zero gradient. Where x and q have
    opposite directions, to 1e-6, s counts as 0 and R^T reflects at the plane orthogonal to x.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides; norms below 1e19.
        q: [..., D], same shape and device; the dtype of x, or float32 if x has half precision.
    Returns:
        [..., D], a copy of q; its gradient goes to x, rotated, and not to q.
    Raises:
        ValueError: shape, dtype or device do not fit, or D == 0.
        BackendUnavailable: the forced backend cannot run these inputs; raised by the backward.

    >>> x = torch.tensor([[2.0, 0.0]], requires_grad=True)
    >>> q = rotation_trick(x, torch.tensor([[0.0, 4.0]]))
    >>> q.tolist(), torch.autograd.grad(q[0, 1], x)[0].tolist()
    ([[0.0, 4.0]], [[2.0, 0.0]])

    Source: Fifty et al. 2024, arXiv:2410.06424.
    """
    check_floating("x", x)
    check_floating("q", q)
    if x.ndim == 0 or q.shape != x.shape or x.shape[-1] == 0:
        raise ValueError(
            f"expected x and q of one shape [..., D] with D >= 1, got {tuple(x.shape)} and {tuple(q.shape)}"
        )
    check_same_device("q", q, "x", x)
    check_parameter_dtype("q", q, "x", x)
    if not is_differentiated(x):
        return q.detach().clone()
    if not torch.compiler.is_exporting():
        return (_RotationTrick if torch.compiler.is_compiling() else _WithForwardMode).apply(x, q)
    # An exported graph holds operations and no Functions: there, detached tensors give the same gradient.
    fixed_x, fixed_q = x.detach(), q.detach()
    return fixed_q + rotate_like(x - fixed_x, fixed_x, fixed_q).to(q.dtype)

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_indices, check_rows, check_same_device, check_tensor
from .gradients import differentiable, gradient_of, is_differentiated, no_forward_mode


@gradient_of("kept_softmax_fwd")
class _KeptSoftmax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.dlvae.kept_softmax_fwd(x, weight, bias, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
        values, sums = output
        ctx.save_for_backward(values, sums, *inputs)
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        values, sums, x, weight, bias, indices = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = torch.ops.dlvae.kept_softmax_bwd(grad, values, sums, x, weight, bias, indices, *needs)
        inputs = (x, weight, bias)
        return (*(g.to(i.dtype) if need else None for g, i, need in zip(grads, inputs, needs, strict=True)), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        no_forward_mode("kept_softmax")


def kept_softmax(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> Tensor:
    """softmax(x W^T + b) over all K codes, at the k codes that each row keeps, without a matrix of rows by codes.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        weight: W, [K, D], same device; the dtype of x, or float32 beside a half-precision x.
        bias: b, [K], dtype and device of weight; or None.
        indices: [..., k] int64, same device; a code may occur twice in a row.
    Returns:
        [..., k] float32 (float64 for float64). Logits and sums are float32 or wider, under autocast too. Gradients
        go to x, weight and bias, summed without float atomics; the backward computes the logits again.
    Raises:
        ValueError: shape, dtype or device do not fit, or (on the CPU) an index lies outside [0, K).
        BackendUnavailable: the forced backend cannot run these inputs.

    Source: the log-sum-exp goes tile by tile as in Milakov and Gimelshein 2018, arXiv:1805.02867, the backward as in
    Dao et al. 2022, arXiv:2205.14135.
    """
    check_rows("x", x, "weight", weight)
    check_indices("indices", indices)
    if indices.ndim != x.ndim or indices.shape[:-1] != x.shape[:-1] or indices.shape[-1] == 0:
        raise ValueError(
            f"indices has shape {tuple(indices.shape)}; it needs {(*x.shape[:-1], 'k')} with the rows of x and k >= 1"
        )
    check_same_device("indices", indices, "weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)} and dtype {bias.dtype};"
                f" it needs [{weight.shape[0]}] and {weight.dtype}, as weight has"
            )
        check_same_device("bias", bias, "weight", weight)
    if is_differentiated(x, weight, bias):
        values, _ = differentiable(_KeptSoftmax, x, weight, bias, indices)
    else:
        fixed_bias = None if bias is None else bias.detach()
        values, _ = torch.ops.dlvae.kept_softmax_fwd(x.detach(), weight.detach(), fixed_bias, indices)
    return values

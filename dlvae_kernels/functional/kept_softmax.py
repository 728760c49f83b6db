from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops  # noqa: F401  (defines torch.ops.dlvae)
from .checks import check_indices, check_rows, check_same_device


class _KeptSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> Tensor:
        values, sums = torch.ops.dlvae.kept_softmax_fwd(x, weight, bias, indices)
        ctx.save_for_backward(values, sums, x, weight, bias, indices)
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        values, sums, x, weight, bias, indices = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = torch.ops.dlvae.kept_softmax_bwd(grad, values, sums, x, weight, bias, indices, *needs)
        inputs = (x, weight, bias)
        return (*(g.to(i.dtype) if need else None for g, i, need in zip(grads, inputs, needs, strict=True)), None)


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
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)} and dtype {bias.dtype};"
                f" it needs [{weight.shape[0]}] and {weight.dtype}, as weight has"
            )
        check_same_device("bias", bias, "weight", weight)
    needs_grad = any(each is not None and each.requires_grad for each in (x, weight, bias))
    if torch.is_grad_enabled() and needs_grad:
        return _KeptSoftmax.apply(x, weight, bias, indices)
    values, _ = torch.ops.dlvae.kept_softmax_fwd(
        x.detach(), weight.detach(), None if bias is None else bias.detach(), indices
    )
    return values

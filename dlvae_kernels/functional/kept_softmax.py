from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import ops
from .checks import check_indices, check_same_device, check_tensor, check_vectors
from .gradients import differentiable, gradient_of, is_differentiated, no_forward_mode, once_differentiable


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
    @once_differentiable("kept_softmax")
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
    """softmax(x W^T + b) over all K codes, at the k codes selected for each vector; the N x K matrix is never
    materialised.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        weight: W, [K, D], same device; the dtype of x, or float32 if x has half precision.
        bias: b, [K], dtype and device of weight; or None.
        indices: [..., k] int64, same device; a code may occur twice for a vector.
    Returns:
        [..., k] float32 (float64 for float64). Logits and sums are float32 or wider, under autocast too. Gradients
        go to x, weight and bias, summed without float atomics; the backward recomputes the logits.
    Raises:
        ValueError: shape, dtype or device do not fit, or (on the CPU) an index lies outside [0, K).
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> x, weight = torch.tensor([[1.0, 0.0]]), torch.zeros(4, 2)
    >>> kept_softmax(x, weight, None, torch.tensor([[0, 3]])).tolist()
    [[0.25, 0.25]]

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (log-sum-exp by tiles); Dao et al. 2022, arXiv:2205.14135
    (backward).
    """
    check_vectors("x", x, "weight", weight)
    check_indices("indices", indices)
    if indices.ndim != x.ndim or indices.shape[:-1] != x.shape[:-1] or indices.shape[-1] == 0:
        raise ValueError(
            f"expected indices of shape [..., k], where x is [..., D] = {tuple(x.shape)} and k >= 1,"
            f" got {tuple(indices.shape)}"
        )
    check_same_device("indices", indices, "weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise ValueError(
                f"expected bias of shape [{weight.shape[0]}] and dtype {weight.dtype}, as weight,"
                f" got {tuple(bias.shape)} and {bias.dtype}"
            )
        check_same_device("bias", bias, "weight", weight)
    if is_differentiated(x, weight, bias):
        values, _ = differentiable(_KeptSoftmax, x, weight, bias, indices)
    else:
        detached_bias = None if bias is None else bias.detach()
        values, _ = ops.call("kept_softmax_fwd", x.detach(), weight.detach(), detached_bias, indices)
    return values

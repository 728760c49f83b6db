from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops  # noqa: F401  (defines torch.ops.dlvae)
from .checks import check_bias, check_choice, check_rows, check_size

Metric = Literal["l2", "dot"]
METRICS = get_args(Metric)


class _TopkProducts(torch.autograd.Function):
    """The gradients are those of k products a row: sums over the kept atoms, never over all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dictionary: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        indices, values = torch.ops.dlvae.topk_codes(x, dictionary, k, "dot", bias)
        ctx.save_for_backward(x, dictionary, indices)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(indices)
        return indices, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, dictionary, indices = ctx.saved_tensors
        need_x, need_dictionary, need_bias, _ = ctx.needs_input_grad
        grad_x = grad_dictionary = grad_bias = None
        if need_x:
            grad_x = torch.ops.dlvae.sparse_decode_fwd(grad, indices, dictionary).to(x.dtype)
        if need_dictionary:
            _, total = torch.ops.dlvae.sparse_decode_bwd(x, grad, indices, dictionary, False, True)
            grad_dictionary = total.to(dictionary.dtype)
        if need_bias:
            total = torch.ops.dlvae.gather_codes_bwd(grad.unsqueeze(-1), indices, len(dictionary))
            grad_bias = total.squeeze(1).to(ctx.bias_dtype)
        return grad_x, grad_dictionary, grad_bias, None


def topk_codes(
    x: Tensor, dictionary: Tensor, k: int, *, metric: Metric = "l2", bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of the k dictionary rows that are best for each row of x: the nearest, or those of largest product.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        dictionary: [K, D], same device; the dtype of x, or float32 beside a half-precision x.
        k: how many to keep, 1 <= k <= K.
        metric: "l2", squared Euclidean distance, or "dot", the inner product x.w plus the atom's bias.
        bias: [K], with "dot" alone; the dtype of dictionary, or float32 beside a half-precision one.
    Returns:
        (indices [..., k] int64, values [..., k] float32, or float64 for float64). With "l2" the values are squared
        distances, ascending, NaN as in `nearest_code`, without gradient. With "dot" they are products, descending, with
        gradients to x, dictionary and bias that are summed without float atomics and without an [N, K] tensor. Equal
        values go by ascending index. A row of x that holds NaN has NaN products and the indices 0 to k - 1; infinite
        and undefined products come after all finite ones, by index, and an atom or bias that holds NaN after those.
    Raises:
        ValueError: D, dtype or device do not fit, K == 0, k is not in [1, K], or a bias does not fit or has no use.
        BackendUnavailable: the forced backend cannot run these inputs.
    """
    check_rows("x", x, "dictionary", dictionary)
    check_size("k", k, 1, dictionary.shape[0])
    check_choice("metric", metric, METRICS)
    if bias is not None:
        if metric != "dot":
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it needs to be None with the metric {metric!r}")
        check_bias("bias", bias, "dictionary", dictionary)
    learned = [each for each in (x, dictionary, bias) if each is not None]
    if metric == "dot" and torch.is_grad_enabled() and any(each.requires_grad for each in learned):
        return _TopkProducts.apply(x, dictionary, bias, k)
    fixed_bias = None if bias is None else bias.detach()
    indices, values = torch.ops.dlvae.topk_codes(x.detach(), dictionary.detach(), k, metric, fixed_bias)
    return indices, values

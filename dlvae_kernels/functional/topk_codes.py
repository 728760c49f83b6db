from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import ops
from .checks import check_bias, check_choice, check_size, check_vectors
from .gradients import differentiable, gradient_of, is_differentiated, once_differentiable

Metric = Literal["l2", "dot"]
METRICS = get_args(Metric)


@gradient_of("topk_codes")
class _TopkCodes(torch.autograd.Function):
    """Gradients of the selected inner products flow to x, dictionary and bias.

    Squared distances are not differentiable.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dictionary: Tensor, k: int, metric: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.dlvae.topk_codes(x, dictionary, k, metric, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, dictionary, _, metric, bias = inputs
        indices, values = output
        ctx.save_for_backward(x, dictionary, indices)
        ctx.save_for_forward(x, dictionary, indices)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*((indices,) if metric == "dot" else (indices, values)))

    @staticmethod
    @once_differentiable("topk_codes")
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dictionary, indices = ctx.saved_tensors
        need_x, need_dictionary, _, _, need_bias = ctx.needs_input_grad
        grad_x = grad_dictionary = grad_bias = None
        if need_x:
            grad_x = torch.ops.dlvae.sparse_decode_fwd(grad, indices, dictionary).to(x.dtype)
        if need_dictionary:
            _, total = torch.ops.dlvae.sparse_decode_bwd(x, grad, indices, dictionary, False, True)
            grad_dictionary = total.to(dictionary.dtype)
        if need_bias:
            total = torch.ops.dlvae.gather_codes_bwd(grad.unsqueeze(-1), indices, len(dictionary), 1)
            grad_bias = total.squeeze(1).to(ctx.bias_dtype)
        return grad_x, grad_dictionary, None, None, grad_bias

    @staticmethod
    def jvp(ctx: Any, x_tangent: Any, dictionary_tangent: Any, k: None, metric: None, bias_tangent: Any) -> Any:
        x, dictionary, indices = ctx.saved_tensors
        values = torch.zeros(indices.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for vectors, atoms in (x_tangent, dictionary), (x, dictionary_tangent):
            if vectors is not None and atoms is not None:
                ones = torch.ones_like(values)
                values = values + torch.ops.dlvae.sparse_decode_bwd(vectors, ones, indices, atoms, True, False)[0]
        return None, values if bias_tangent is None else values + bias_tangent[indices]


def topk_codes(
    x: Tensor, dictionary: Tensor, k: int, *, metric: Metric = "l2", bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of the k best atoms for each vector of x: the nearest, or those of largest inner product.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        dictionary: [K, D], same device; the dtype of x, or float32 if x has half precision.
        k: the number of selected atoms, 1 <= k <= K.
        metric: "l2", squared Euclidean distance, or "dot", the inner product x.w plus the atom's bias.
        bias: [K], only with the metric "dot"; the dtype of dictionary, or float32 if that has half precision.
    Returns:
        (indices [..., k] int64, values [..., k] float32, or float64 for float64). With "l2" the values are squared
        distances, ascending, NaN as in `nearest_code`, without gradient. With "dot" they are products, descending, with
        gradients to x, dictionary and bias, summed without float atomics; the N x K matrix is never materialised.
        Equal values are ordered by ascending index. A vector that holds NaN has NaN products and the indices 0 to
        k - 1; infinite and undefined products come after all finite ones, by index, and an atom or bias that holds
        NaN comes last.
    Raises:
        ValueError: D, dtype or device do not fit, K == 0, k is not in [1, K], or bias has the wrong shape
            or dtype, or metric is not "dot".
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> dictionary = torch.tensor([[5.0], [1.0], [3.0], [1.0]])
    >>> indices, distances = topk_codes(torch.tensor([[0.0]]), dictionary, k=3)
    >>> indices.tolist(), distances.tolist()
    ([[1, 3, 2]], [[1.0, 1.0, 9.0]])
    >>> indices, products = topk_codes(torch.tensor([[2.0]]), dictionary, k=2, metric="dot")
    >>> indices.tolist(), products.tolist()
    ([[0, 2]], [[10.0, 6.0]])
    """
    check_vectors("x", x, "dictionary", dictionary)
    k = check_size("k", k, 1, dictionary.shape[0])
    check_choice("metric", metric, METRICS)
    if bias is not None:
        if metric != "dot":
            raise ValueError(
                f'expected bias to be None with metric={metric!r}, got shape {tuple(bias.shape)}; pass metric="dot"'
            )
        check_bias("bias", bias, "dictionary", dictionary)
    if metric == "dot" and is_differentiated(x, dictionary, bias):
        indices, values = differentiable(_TopkCodes, x, dictionary, k, metric, bias)
    else:
        detached_bias = None if bias is None else bias.detach()
        indices, values = ops.call("topk_codes", x.detach(), dictionary.detach(), k, metric, detached_bias)
    return indices, values

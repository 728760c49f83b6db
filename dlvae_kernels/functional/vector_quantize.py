from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import ops
from .checks import check_choice, check_vectors
from .gradients import (
    differentiable,
    gradient_of,
    inputs_of_func,
    is_differentiated,
    once_differentiable,
    sum_of_products,
)
from .nearest_code import PRECISIONS, Precision
from .rotation_trick import rotation_trick

Gradient = Literal["straight_through", "rotation"]
GRADIENTS = get_args(Gradient)


class VectorQuantizeOutput(NamedTuple):
    """The result of `vector_quantize`, which describes the fields.

    >>> VectorQuantizeOutput._fields
    ('quantized', 'indices', 'codebook_loss', 'commitment_loss', 'counts')
    """

    quantized: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    counts: Tensor


@gradient_of("vector_quantize_fwd")
class _VectorQuantize(torch.autograd.Function):
    """Saves (quantized - x) / 2 for the backward.

    The caller may change x and quantized in place before the backward; half of the difference fits into float16.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, codebook: Tensor, need_error: bool, precision: str, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        return torch.ops.dlvae.vector_quantize_fwd(x, codebook, need_error, precision, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, codebook, ctx.has_error, _, _ = inputs
        _, indices, _, _, counts, half_error = output
        ctx.save_for_backward(half_error, indices, *inputs_of_func(x, codebook))
        ctx.save_for_forward(half_error, indices)
        ctx.num_codes, ctx.codebook_dtype = codebook.shape[0], codebook.dtype
        ctx.mark_non_differentiable(indices, counts, half_error)
        # A zero gradient of half_error would be one more tensor [N, D].
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("vector_quantize", saves_inputs=False)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.has_error:
            raise RuntimeError(
                "expected vector_quantize_fwd with need_error=True for a backward, got need_error=False;"
                " export or trace the model with gradients enabled"
            )
        grad_quantized, _, grad_codebook_loss, grad_commitment_loss, _, _ = grads
        half_error, indices, *_ = ctx.saved_tensors
        need_x, need_codebook, *_ = ctx.needs_input_grad
        if grad_quantized is None and grad_codebook_loss is None and grad_commitment_loss is None:
            return None, None, None, None, None
        if grad_quantized is None:
            grad_quantized = torch.zeros_like(half_error)
        loss_dtype = torch.promote_types(half_error.dtype, torch.float32)
        grad_losses = (
            half_error.new_zeros((), dtype=loss_dtype) if grad is None else grad
            for grad in (grad_codebook_loss, grad_commitment_loss)
        )
        grad_x, grad_codebook = torch.ops.dlvae.vector_quantize_bwd(
            grad_quantized,
            *grad_losses,
            half_error,
            indices,
            ctx.num_codes,
            1,
            need_x,
            need_codebook,
        )
        grad_codebook = grad_codebook.to(ctx.codebook_dtype) if need_codebook else None
        return grad_x if need_x else None, grad_codebook, None, None, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, codebook_tangent: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        half_error, indices = ctx.saved_tensors
        slope = 4 / max(1, half_error.numel())
        # The straight-through output depends only on x.
        quantized = torch.zeros_like(half_error) if x_tangent is None else x_tangent.clone()
        tangent = torch.zeros_like(half_error) if x_tangent is None else x_tangent
        commitment_loss = -slope * sum_of_products(half_error, tangent)
        if codebook_tangent is None:
            codebook_loss = torch.zeros_like(commitment_loss)
        else:
            codebook_loss = slope * sum_of_products(half_error, codebook_tangent[indices])
        return quantized, None, codebook_loss, commitment_loss, None, None


def vector_quantize(
    x: Tensor, codebook: Tensor, *, gradient: Gradient = "straight_through", precision: Precision = "float32"
) -> VectorQuantizeOutput:
    """Replace each vector of x by its nearest code, with a gradient that passes to x and both losses.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        codebook: [K, D], same device; the dtype of x, or float32 if x has half precision.
        gradient: "straight_through": the gradient of quantized passes to x unchanged; "rotation": by `rotation_trick`.
        precision: precision of the search, as in `nearest_code`.
    Returns:
        quantized [..., D]: codebook[indices], with the dtype and (where x is dense) strides of x; its gradient passes
        to x, as `gradient` says;
        indices [...] int64, as from `nearest_code`;
        codebook_loss and commitment_loss, scalars, float32 (float64 for float64): both are the mean over all elements
        of (quantized - x)^2; the gradient of the first goes only to the codebook, that of the second only to x;
        counts [K] int64, the number of vectors assigned to each code.
    Raises:
        ValueError: D, dtype or device do not fit, or K == 0.
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> out = vector_quantize(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    >>> out.quantized.tolist(), out.indices.tolist(), out.counts.tolist()
    ([[0.0, 0.0], [4.0, 0.0]], [0, 1], [1, 1])
    >>> float(out.codebook_loss), float(out.commitment_loss)
    (1.5, 1.5)

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 3; Fifty et al. 2024, arXiv:2410.06424 (rotation).
    """
    check_vectors("x", x, "codebook", codebook)
    check_choice("gradient", gradient, GRADIENTS)
    check_choice("precision", precision, PRECISIONS)
    if is_differentiated(x, codebook):
        *outputs, _ = differentiable(_VectorQuantize, x, codebook, True, precision, None)
    else:
        *outputs, _ = ops.call("vector_quantize_fwd", x.detach(), codebook.detach(), False, precision, None)
    if gradient == "rotation":
        outputs[0] = rotation_trick(x, outputs[0])
    return VectorQuantizeOutput(*outputs)

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import ops
from .checks import check_choice, check_flags, check_vectors
from .gather_codes import num_heads_of, select_codes
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
        x, codebook, ctx.has_error, _, mask = inputs
        _, indices, _, _, counts, half_error = output
        ctx.save_for_backward(half_error, indices, *inputs_of_func(x, codebook))
        ctx.save_for_forward(half_error, indices)
        ctx.codebook_shape, ctx.codebook_dtype, ctx.has_mask = codebook.shape, codebook.dtype, mask is not None
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
        factor = _elements_per_valid(indices, loss_dtype) if ctx.has_mask else 1
        grad_losses = (
            half_error.new_zeros((), dtype=loss_dtype) if grad is None else grad * factor
            for grad in (grad_codebook_loss, grad_commitment_loss)
        )
        grad_x, grad_codebook = torch.ops.dlvae.vector_quantize_bwd(
            grad_quantized,
            *grad_losses,
            half_error,
            indices,
            ctx.codebook_shape[-2],
            num_heads_of(ctx.codebook_shape),
            need_x,
            need_codebook,
        )
        grad_codebook = grad_codebook.to(ctx.codebook_dtype).view(ctx.codebook_shape) if need_codebook else None
        return grad_x if need_x else None, grad_codebook, None, None, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, codebook_tangent: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        half_error, indices = ctx.saved_tensors
        slope = 4 / max(1, half_error.numel())
        # The straight-through output depends only on x.
        quantized = torch.zeros_like(half_error) if x_tangent is None else x_tangent.clone()
        if ctx.has_mask:
            quantized = torch.where((indices < 0).unsqueeze(-1), 0, quantized)
            slope = slope * _elements_per_valid(indices, torch.promote_types(half_error.dtype, torch.float32))
        commitment_loss = -slope * sum_of_products(half_error, quantized)
        if codebook_tangent is None:
            codebook_loss = torch.zeros_like(commitment_loss)
        else:
            codebook_loss = slope * sum_of_products(half_error, select_codes(codebook_tangent, indices))
        return quantized, None, codebook_loss, commitment_loss, None, None


def _elements_per_valid(indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of all vectors over that of the vectors with a code: the factor of a mean over the latter."""
    return indices.numel() / (indices >= 0).sum().clamp(min=1).to(dtype)


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    gradient: Gradient = "straight_through",
    precision: Precision = "float32",
) -> VectorQuantizeOutput:
    """Replace each vector of x by its nearest code, with a gradient that passes to x and both losses.

    Args:
        x: [..., D], or [..., H, D] with heads; float16, bfloat16, float32 or (reference) float64, any strides.
        codebook: [K, D], or [H, K, D] with one codebook for each head; same device; the dtype of x, or float32 if x has
            half precision.
        mask: [...] bool, same device, True for the vectors that take part; with heads [..., H], or [...] for all heads
            of a vector alike. A vector that is masked out has the quantized value 0, the index -1 (no code), no
            gradient, and no share in the losses and counts. None for all vectors.
        gradient: "straight_through": the gradient of quantized passes to x unchanged; "rotation": by `rotation_trick`.
        precision: precision of the search, as in `nearest_code`.
    Returns:
        quantized [..., D]: the nearest codes, with the dtype and (where x is dense) strides of x; its gradient passes
        to x, as `gradient` says;
        indices [...], or [..., H] with heads, int64, as from `nearest_code`;
        codebook_loss and commitment_loss, scalars, float32 (float64 for float64): both are the mean over all elements
        of (quantized - x)^2 (of the vectors that take part; 0 if none does); the gradient of the first goes only to the
        codebook, that of the second only to x;
        counts [K], or [H, K] with heads, int64, the number of vectors assigned to each code.
    Raises:
        ValueError: D, H, the shape of mask, dtype or device do not fit, or K == 0.
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> out = vector_quantize(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    >>> out.quantized.tolist(), out.indices.tolist(), out.counts.tolist()
    ([[0.0, 0.0], [4.0, 0.0]], [0, 1], [1, 1])
    >>> float(out.codebook_loss), float(out.commitment_loss)
    (1.5, 1.5)
    >>> out = vector_quantize(torch.ones(2, 1), torch.zeros(1, 1), mask=torch.tensor([True, False]))
    >>> out.indices.tolist(), float(out.commitment_loss)
    ([0, -1], 1.0)

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 3; Fifty et al. 2024, arXiv:2410.06424 (rotation).
    """
    check_vectors("x", x, "codebook", codebook, heads=True)
    check_choice("gradient", gradient, GRADIENTS)
    check_choice("precision", precision, PRECISIONS)
    if mask is not None:
        # One mask for all heads.
        if codebook.ndim == 3 and isinstance(mask, Tensor) and mask.shape == x.shape[:-2]:
            mask = mask.unsqueeze(-1).expand(x.shape[:-1])
        check_flags("mask", mask, x.shape[:-1], "x", x)
    if is_differentiated(x, codebook):
        *outputs, _ = differentiable(_VectorQuantize, x, codebook, True, precision, mask)
    else:
        *outputs, _ = ops.call("vector_quantize_fwd", x.detach(), codebook.detach(), False, precision, mask)
    if gradient == "rotation":
        # The gradient of a vector that is masked out is 0 even if it holds NaN.
        vectors = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
        outputs[0] = rotation_trick(vectors, outputs[0])
    return VectorQuantizeOutput(*outputs)

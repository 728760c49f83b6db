from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops  # noqa: F401  (defines torch.ops.dlvae)
from .checks import check_choice, check_rows
from .nearest_code import PRECISIONS, Precision


class VectorQuantizeOutput(NamedTuple):
    """What `vector_quantize` returns; the fields are described there."""

    quantized: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    counts: Tensor


class _VectorQuantize(torch.autograd.Function):
    # Saves the errors, q - x: the codebook and the quantized rows may both be changed in place before the backward.
    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, precision: str) -> tuple[Tensor, ...]:
        *outputs, error = torch.ops.dlvae.vector_quantize_fwd(x, codebook, True, precision)
        _, indices, _, _, counts = outputs
        ctx.save_for_backward(error, indices)
        ctx.num_codes, ctx.codebook_dtype = codebook.shape[0], codebook.dtype
        ctx.mark_non_differentiable(indices, counts)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_quantized, _, grad_codebook_loss, grad_commitment_loss, _ = grads
        error, indices = ctx.saved_tensors
        need_x, need_codebook, _ = ctx.needs_input_grad
        grad_x, grad_codebook = torch.ops.dlvae.vector_quantize_bwd(
            grad_quantized,
            grad_codebook_loss,
            grad_commitment_loss,
            error,
            indices,
            ctx.num_codes,
            need_x,
            need_codebook,
        )
        return grad_x if need_x else None, grad_codebook.to(ctx.codebook_dtype) if need_codebook else None, None


def vector_quantize(x: Tensor, codebook: Tensor, *, precision: Precision = "float32") -> VectorQuantizeOutput:
    """Replace each row of x by its nearest codebook row, with the straight-through gradient and both losses.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        codebook: [K, D], same device; the dtype of x, or float32 beside a half-precision x.
        precision: of the search, as in `nearest_code`.
    Returns:
        quantized [..., D], dtype and (where x is dense) strides of x: codebook[indices]; its gradient passes to x
        unchanged;
        indices [...] int64, as from `nearest_code`;
        codebook_loss and commitment_loss, scalars, float32 (float64 for float64): both are the mean over all elements
        of (quantized - x)^2; the gradient of the first goes to the codebook alone, of the second to x alone;
        counts [K] int64, how many rows took each code.
    Raises:
        ValueError: D, dtype or device do not fit, or K == 0.
        BackendUnavailable: the forced backend cannot run these inputs.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 3.
    """
    check_rows("x", x, "codebook", codebook)
    check_choice("precision", precision, PRECISIONS)
    if torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad):
        return VectorQuantizeOutput(*_VectorQuantize.apply(x, codebook, precision))
    *outputs, _ = torch.ops.dlvae.vector_quantize_fwd(x.detach(), codebook.detach(), False, precision)
    return VectorQuantizeOutput(*outputs)

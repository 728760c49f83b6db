from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .checks import check_codebook, check_indices, check_same_device
from .gradients import differentiable, gradient_of, is_differentiated, once_differentiable


@gradient_of("gather_codes_fwd")
class _GatherCodes(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(codebook: Tensor, indices: Tensor) -> Tensor:
        return torch.ops.dlvae.gather_codes_fwd(codebook, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        codebook, indices = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.shape, ctx.dtype = codebook.shape, codebook.dtype

    @staticmethod
    @once_differentiable("gather_codes")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        grad_codebook = torch.ops.dlvae.gather_codes_bwd(grad, indices, ctx.shape[-2], num_heads_of(ctx.shape))
        return grad_codebook.to(ctx.dtype).view(ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, codebook_tangent: Tensor, _: None) -> Tensor:
        return select_codes(codebook_tangent, *ctx.saved_tensors)


def num_heads_of(shape: torch.Size) -> int:
    """The number of heads of a codebook: 1 for the shape [K, D], and H for [H, K, D]."""
    return shape[0] if len(shape) == 3 else 1


def select_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes at indices, and zeros for -1, by operations of torch, which every transform supports."""
    places = indices.clamp(min=0)
    heads = (torch.arange(len(codebook), device=codebook.device),) if codebook.ndim == 3 else ()
    return torch.where((indices < 0).unsqueeze(-1), 0, codebook[(*heads, places)])


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes at `indices`.

    Args:
        codebook: [K, D], or [H, K, D] with heads; float16, bfloat16, float32 or (reference) float64.
        indices: [...], or [..., H] with heads, int64, same device. -1 stands for no code.
    Returns:
        [..., D], or [..., H, D] with heads, of the codebook's dtype; zeros where the index is -1. Its gradient goes to
        the codebook, summed without float atomics.
    Raises:
        ValueError: dtype, shape or device do not fit, or (on the CPU) an index lies outside [-1, K).
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> gather_codes(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0, 1])).tolist()
    [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    """
    check_codebook("codebook", codebook, heads=True)
    check_indices("indices", indices)
    if codebook.ndim == 3 and (indices.ndim == 0 or indices.shape[-1] != codebook.shape[0]):
        raise ValueError(
            f"expected indices of shape [..., {codebook.shape[0]}], with the H of codebook [H, K, D],"
            f" got {tuple(indices.shape)}"
        )
    check_same_device("indices", indices, "codebook", codebook)
    if is_differentiated(codebook):
        return differentiable(_GatherCodes, codebook, indices)
    return ops.call("gather_codes_fwd", codebook, indices)

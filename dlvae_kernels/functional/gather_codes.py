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
        ctx.num_codes, ctx.dtype = codebook.shape[0], codebook.dtype

    @staticmethod
    @once_differentiable("gather_codes")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return torch.ops.dlvae.gather_codes_bwd(grad, indices, ctx.num_codes, 1).to(ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, codebook_tangent: Tensor, _: None) -> Tensor:
        return codebook_tangent[ctx.saved_tensors[0]]


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes at `indices`.

    Args:
        codebook: [K, D] float16, bfloat16, float32 or (reference) float64.
        indices: [...] int64, same device.
    Returns:
        [..., D] of the codebook's dtype. Its gradient goes to the codebook, summed without float atomics.
    Raises:
        ValueError: dtype, rank or device do not fit, or (on the CPU) an index lies outside [0, K).
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> gather_codes(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0, 1])).tolist()
    [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    """
    check_codebook("codebook", codebook)
    check_indices("indices", indices)
    check_same_device("indices", indices, "codebook", codebook)
    if is_differentiated(codebook):
        return differentiable(_GatherCodes, codebook, indices)
    return ops.call("gather_codes_fwd", codebook, indices)

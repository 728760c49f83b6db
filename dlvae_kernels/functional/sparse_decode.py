from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .checks import check_codebook, check_floating, check_indices, check_same_device
from .gradients import differentiable, gradient_of, is_differentiated, once_differentiable


@gradient_of("sparse_decode_fwd")
class _SparseDecode(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
        return torch.ops.dlvae.sparse_decode_fwd(values, indices, dictionary)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("sparse_decode")
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, Tensor | None]:
        if grad is None:
            return None, None, None
        values, indices, dictionary = ctx.saved_tensors
        need_values, _, need_dictionary = ctx.needs_input_grad
        grad_values, grad_dictionary = torch.ops.dlvae.sparse_decode_bwd(
            grad, values, indices, dictionary, need_values, need_dictionary
        )
        return (
            grad_values.to(values.dtype) if need_values else None,
            None,
            grad_dictionary.to(dictionary.dtype) if need_dictionary else None,
        )

    @staticmethod
    def jvp(ctx: Any, values_tangent: Tensor | None, _: None, dictionary_tangent: Tensor | None) -> Tensor:
        values, indices, dictionary = ctx.saved_tensors
        # The sum is linear in values and in dictionary; at least one of them has a tangent.
        pairs = (values_tangent, dictionary), (values, dictionary_tangent)
        terms = [
            torch.ops.dlvae.sparse_decode_fwd(value, indices, atoms)
            for value, atoms in pairs
            if value is not None and atoms is not None
        ]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def sparse_decode(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    """For each vector the weighted sum of k atoms: sum_j values[..., j] * dictionary[indices[..., j]].

    Args:
        values: [..., k] float16, bfloat16, float32 or (reference) float64.
        indices: [..., k] int64, same shape and device; an atom may occur twice for a vector.
        dictionary: [K, D], same device.
    Returns:
        [..., D], the wider dtype of values and dictionary; sums accumulate in float32 (float64 for float64).
        Gradients go to values and dictionary, summed without float atomics.
    Raises:
        ValueError: shape, dtype or device do not fit, or (on the CPU) an index lies outside [0, K).
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> dictionary = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 7.0]])
    >>> sparse_decode(torch.tensor([[2.0, -1.0]]), torch.tensor([[0, 2]]), dictionary).tolist()
    [[-3.0, -7.0]]
    """
    check_floating("values", values)
    check_codebook("dictionary", dictionary)
    check_indices("indices", indices)
    if values.ndim == 0 or values.shape[-1] == 0 or values.shape != indices.shape:
        raise ValueError(
            f"expected values and indices of one shape [..., k] with k >= 1, got {tuple(values.shape)} and"
            f" {tuple(indices.shape)}"
        )
    check_same_device("values", values, "dictionary", dictionary)
    check_same_device("indices", indices, "dictionary", dictionary)
    if is_differentiated(values, dictionary):
        return differentiable(_SparseDecode, values, indices, dictionary)
    return ops.call("sparse_decode_fwd", values.detach(), indices, dictionary.detach())

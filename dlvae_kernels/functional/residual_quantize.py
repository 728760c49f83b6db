from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from .checks import (
    check_choice,
    check_codebooks,
    check_flags,
    check_indices,
    check_same_device,
    check_size,
    check_vectors_of_levels,
)
from .gradients import differentiable, gradient_of, is_differentiated, no_forward_mode, once_differentiable
from .nearest_code import PRECISIONS, Precision
from .sparse_decode import sparse_decode

ResidualGradient = Literal["once", "each", "rotation", "rotation_each"]
GRADIENTS = get_args(ResidualGradient)


class ResidualQuantizeOutput(NamedTuple):
    """The result of `residual_quantize`, which describes the fields.

    >>> ResidualQuantizeOutput._fields
    ('quantized', 'indices', 'codebook_loss', 'commitment_loss', 'counts')
    """

    quantized: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    counts: Tensor


@gradient_of("residual_quantize_fwd")
class _ResidualQuantize(torch.autograd.Function):
    """Saves its inputs and the indices; the backward computes the residuals again, in place of [N, D] a level."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, codebooks: Tensor, levels: Tensor | None, mask: Tensor | None, precision: str, gradient: str
    ) -> tuple[Tensor, ...]:
        return torch.ops.dlvae.residual_quantize_fwd(x, codebooks, levels, mask, precision, gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, codebooks, _, mask, _, ctx.gradient = inputs
        _, indices, _, _, counts = output
        ctx.save_for_backward(x, codebooks, indices, mask)
        ctx.mark_non_differentiable(indices, counts)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("residual_quantize")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_quantized, _, *grad_losses, _ = grads
        x, codebooks, indices, mask = ctx.saved_tensors
        need_x, need_codebooks, *_ = ctx.needs_input_grad
        if grad_quantized is None and grad_losses == [None, None]:
            return None, None, None, None, None, None
        if grad_quantized is None:
            grad_quantized = torch.zeros_like(x)
        loss_dtype = torch.promote_types(x.dtype, torch.float32)
        slopes = [x.new_zeros(len(codebooks), dtype=loss_dtype) if grad is None else grad for grad in grad_losses]
        if mask is not None:
            # The operation differentiates a mean over all vectors; the losses are means over the valid ones.
            share = mask.numel() / mask.sum(dtype=torch.float64).clamp(min=1)
            slopes = [slope * share for slope in slopes]
        grad_x, grad_codebooks = torch.ops.dlvae.residual_quantize_bwd(
            grad_quantized, *slopes, x, indices, codebooks, ctx.gradient, need_x, need_codebooks
        )
        grad_codebooks = grad_codebooks.to(codebooks.dtype) if need_codebooks else None
        return grad_x if need_x else None, grad_codebooks, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> tuple[Tensor, ...]:
        no_forward_mode("residual_quantize")


def residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    *,
    levels: int | Tensor | None = None,
    mask: Tensor | None = None,
    gradient: ResidualGradient = "once",
    precision: Precision = "float32",
) -> ResidualQuantizeOutput:
    """Replace each vector of x by a sum of L codes: each level quantizes what the levels before it left.

    r_0 = x; level l assigns r_l to its nearest code c_l of codebooks[l], and r_{l+1} = r_l - c_l. The residual is
    defined in float32, so that all backends find the same codes. A level that does not run leaves it unchanged.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        codebooks: [L, K, D], same device; the dtype of x, or float32 if x has half precision.
        levels: which levels run: None for all; an integer n in [1, L] for the first n; or [L] bool, same device
            (quantizer dropout), which the host never reads.
        mask: [...] bool, same device: True for a valid vector. A masked vector gets indices of -1 and zeros, and is in
            no loss or count.
        gradient: the gradient that passes from quantized to x. "once": unchanged (straight-through). "each": once for
            each level that ran, as in vector-quantize-pytorch, so L-fold. "rotation": the rotation trick, from x to
            quantized. "rotation_each": the sum of the rotation tricks from r_l to c_l over the levels that ran, as in
            vector-quantize-pytorch. It is 0 for a vector that no level quantized.
        precision: precision of the search, as in `nearest_code`.
    Returns:
        quantized [..., D]: c_0 + c_1 + ..., added in float32 in this order, with the dtype and (where x is dense)
        strides of x;
        indices [..., L] int64, -1 where a level did not run;
        codebook_loss and commitment_loss [L], float32 (float64 for float64): both are the mean over the elements of
        valid vectors of (c_l - r_l)^2, 0 where the level did not run. The gradient of the first goes only to
        codebooks[l], that of the second only to x (all other levels are held);
        counts [L, K] int64, the number of vectors assigned to each code.
    Raises:
        ValueError: shape, dtype or device do not fit, or a name is unknown.
        BackendUnavailable: the forced backend cannot run these inputs.

    The backward reads x and codebooks again. If they were changed in place since, it raises "modified by an inplace
    operation", as for any PyTorch function; pass codebooks.clone() where an update comes between.

    >>> codebooks = torch.tensor([[[0.0, 0.0], [4.0, 0.0]], [[0.0, 0.0], [-1.0, 1.0]]])
    >>> out = residual_quantize(torch.tensor([[3.0, 2.0]]), codebooks)
    >>> out.quantized.tolist(), out.indices.tolist(), out.commitment_loss.tolist()
    ([[3.0, 1.0]], [[1, 1]], [2.5, 0.5])

    Sources: Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1 (residual quantization) and section III-C (quantizer
    dropout); Fifty et al. 2024, arXiv:2410.06424, section 4.2 (rotation trick).
    """
    check_vectors_of_levels("x", x, "codebooks", codebooks)
    check_choice("gradient", gradient, GRADIENTS)
    check_choice("precision", precision, PRECISIONS)
    if mask is not None:
        check_flags("mask", mask, x.shape[:-1], "x", x)
    num_levels, missing = codebooks.shape[0], 0
    if isinstance(levels, Tensor):
        check_flags("levels", levels, codebooks.shape[:1], "codebooks", codebooks)
    elif levels is not None:
        missing = num_levels - check_size("levels", levels, 1, num_levels)
        codebooks, levels = codebooks[: num_levels - missing], None
    if is_differentiated(x, codebooks):
        outputs = differentiable(_ResidualQuantize, x, codebooks, levels, mask, precision, gradient)
    else:
        args = x.detach(), codebooks.detach(), levels, mask, precision, gradient
        outputs = ops.call("residual_quantize_fwd", *args)
    output = ResidualQuantizeOutput(*outputs)
    if missing == 0:
        return output
    return ResidualQuantizeOutput(
        output.quantized,
        pad(output.indices, (0, missing), value=-1),
        pad(output.codebook_loss, (0, missing)),
        pad(output.commitment_loss, (0, missing)),
        pad(output.counts, (0, 0, 0, missing)),
    )


def residual_statistics(x: Tensor, indices: Tensor, codebooks: Tensor) -> Tensor:
    """Sum and number of the residuals that are assigned to each code of each level, for one all-reduce over ranks.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        indices: [..., L] int64 in [-1, K), same device, from `residual_quantize`; -1 stands for no code.
        codebooks: [L, K, D], same device, that gave the indices; the dtype of x, or float32 if x has half precision.
    Returns:
        [L, K, D + 1] float32 (float64 for float64): for each level what `ema_statistics` gives for its residuals, the
        sums in D columns and the counts in the last. No gradient.
        A residual that holds NaN or infinity is left out: it would make the moving averages NaN or infinite.
    Raises:
        ValueError: shape, dtype or device do not fit, or (on the CPU) an index lies outside [-1, K).
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> codebooks = torch.tensor([[[0.0, 0.0], [4.0, 0.0]], [[0.0, 0.0], [-1.0, 1.0]]])
    >>> residual_statistics(torch.tensor([[3.0, 2.0]]), torch.tensor([[1, 1]]), codebooks).tolist()
    [[[0.0, 0.0, 0.0], [3.0, 2.0, 1.0]], [[0.0, 0.0, 0.0], [-1.0, 2.0, 1.0]]]

    Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1.
    """
    check_vectors_of_levels("x", x, "codebooks", codebooks)
    _check_indices_of_levels(indices, codebooks)
    if indices.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"expected indices of shape {(*x.shape[:-1], len(codebooks))}, one for each vector of x and level,"
            f" got {tuple(indices.shape)}"
        )
    return ops.call("residual_statistics", x.detach(), indices, codebooks.detach())


def residual_decode(codebooks: Tensor, indices: Tensor) -> Tensor:
    """For each vector the sum of the codes of all levels: the inverse of `residual_quantize`.

    Args:
        codebooks: [L, K, D] float16, bfloat16, float32 or (reference) float64.
        indices: [..., L] int64 in [-1, K), same device; -1 adds nothing.
    Returns:
        [..., D] of the dtype of codebooks, summed in float32 (float64 for float64). Its gradient goes to codebooks,
        summed without float atomics.
    Raises:
        ValueError: shape, dtype or device do not fit, or (on the CPU) an index lies outside [-1, K).
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> codebooks = torch.tensor([[[0.0, 0.0], [4.0, 0.0]], [[0.0, 0.0], [-1.0, 1.0]]])
    >>> residual_decode(codebooks, torch.tensor([[1, 1], [1, -1]])).tolist()
    [[3.0, 1.0], [4.0, 0.0]]
    """
    check_codebooks("codebooks", codebooks)
    _check_indices_of_levels(indices, codebooks)
    num_levels, num_codes, num_features = codebooks.shape
    offsets = torch.arange(0, num_levels * num_codes, num_codes, device=indices.device)
    # An index out of range stays out of range among the atoms, where it raises.
    in_range = (indices >= -1) & (indices < num_codes)
    atoms = torch.where(in_range, indices.clamp(min=0) + offsets, num_levels * num_codes)
    values = (indices >= 0).to(torch.promote_types(codebooks.dtype, torch.float32))
    dictionary = codebooks.reshape(num_levels * num_codes, num_features)
    return sparse_decode(values, atoms, dictionary).to(codebooks.dtype)


def _check_indices_of_levels(indices: Tensor, codebooks: Tensor) -> None:
    check_indices("indices", indices)
    if indices.ndim == 0 or indices.shape[-1] != len(codebooks):
        raise ValueError(
            f"expected indices of shape [..., {len(codebooks)}], with the L of codebooks, got {tuple(indices.shape)}"
        )
    check_same_device("indices", indices, "codebooks", codebooks)

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import ops
from .checks import check_flags, check_vectors
from .gradients import differentiable, gradient_of, is_differentiated, no_forward_mode, once_differentiable


class CodeEntropyOutput(NamedTuple):
    """The result of `code_entropy`, which describes the fields.

    >>> CodeEntropyOutput._fields
    ('per_sample', 'batch', 'mean_probabilities')
    """

    per_sample: Tensor
    batch: Tensor
    mean_probabilities: Tensor


@gradient_of("code_entropy_fwd")
class _CodeEntropy(torch.autograd.Function):
    """Saves its inputs and two numbers a vector; the backward computes the probabilities again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codebook: Tensor, temperature: float, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.dlvae.code_entropy_fwd(x, codebook, temperature, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, codebook, ctx.temperature, mask = inputs
        entropies, sums, _ = output
        ctx.save_for_backward(x, codebook, sums, entropies, mask)
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("code_entropy")
    def backward(
        ctx: Any, grad_entropies: Tensor | None, _: None, grad_means: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, codebook, sums, entropies, mask = ctx.saved_tensors
        need_x, need_codebook, *_ = ctx.needs_input_grad
        if grad_entropies is None and grad_means is None:
            return None, None, None, None
        if grad_entropies is None:
            grad_entropies = torch.zeros_like(entropies)
        if grad_means is None:
            grad_means = entropies.new_zeros(len(codebook))
        grad_x, grad_codebook = torch.ops.dlvae.code_entropy_bwd(
            grad_entropies, grad_means, x, codebook, sums, entropies, ctx.temperature, mask, need_x, need_codebook
        )
        return (
            grad_x.to(x.dtype) if need_x else None,
            grad_codebook.to(codebook.dtype) if need_codebook else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        no_forward_mode("code_entropy")


def code_entropy(
    x: Tensor, codebook: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> CodeEntropyOutput:
    """The entropies of soft assignments, for losses that keep all codes of a codebook in use.

    The soft assignment of a vector is p = softmax over k of -|x - c_k|^2 / temperature. The usual loss is
    `per_sample - gamma * batch`: certain assignments, and all codes alike. No N x K matrix is materialised.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        codebook: [K, D], same device; the dtype of x, or float32 if x has half precision.
        temperature: above 0.
        mask: [...] bool, same device, True for the vectors that take part; None for all.
    Returns:
        per_sample: scalar, the mean over the vectors of the entropy of p; batch: scalar, the entropy of the mean of p;
        both in nats, 0 without vectors; mean_probabilities: [K], the mean of p. float32 (float64 for float64).
        Gradients go to x and codebook; sums have a fixed order, and the backward computes the probabilities again.
    Raises:
        ValueError: shape, dtype or device do not fit, or the temperature is not above 0.
        BackendUnavailable: the forced backend cannot run these inputs.

    Several ranks have one batch entropy, that of the mean over all their vectors: average `mean_probabilities` over the
    ranks by `layers.distributed.all_reduce_mean`, which is differentiable, and pass the result to `entropy`.

    >>> out = code_entropy(torch.tensor([[0.0], [8.0]]), torch.tensor([[0.0], [8.0]]))
    >>> round(float(out.per_sample), 4), round(float(out.batch), 4), out.mean_probabilities.tolist()
    (0.0, 0.6931, [0.5, 0.5])

    Source: Jansen et al. 2019, arXiv:1911.05894 (loss); Yu et al. 2023, arXiv:2310.05737 (for quantizers).
    """
    check_vectors("x", x, "codebook", codebook)
    if not temperature > 0:
        raise ValueError(f"expected temperature to be above 0, got {temperature}")
    if mask is not None:
        check_flags("mask", mask, x.shape[:-1], "x", x)
    if is_differentiated(x, codebook):
        entropies, _, means = differentiable(_CodeEntropy, x, codebook, float(temperature), mask)
    else:
        entropies, _, means = ops.call("code_entropy_fwd", x.detach(), codebook.detach(), float(temperature), mask)
    count = max(1, x.shape[:-1].numel()) if mask is None else mask.sum().clamp(min=1)
    return CodeEntropyOutput(entropies.sum() / count, entropy(means), means)


def entropy(probabilities: Tensor) -> Tensor:
    """The entropy in nats of probabilities [..., K]: [...], with finite gradients where one is 0.

    >>> round(float(entropy(torch.tensor([0.5, 0.5, 0.0]))), 4)
    0.6931
    """
    return -(probabilities * probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()).sum(-1)

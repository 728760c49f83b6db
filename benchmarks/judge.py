"""Judges of answers: every answer is compared with float64 on the same inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from .calls import Prepare, Tensors, differentiable
from .entry import Judge, Tolerance, Verdict
from .inputs import Inputs

_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
INVALID = Verdict(1.0, float("inf"), True)


def nearest(inputs: Inputs, answer: Tensors, gradients: object, tolerance: Tolerance) -> Verdict:
    """Judge indices [N]: wrong if an assigned code is farther than the nearest by more than rounding explains."""
    (indices,) = answer
    if not _in_range(indices, inputs.size.k):
        return INVALID
    best, expected = _nearest(inputs)
    excess = distances_at(inputs.x.double(), inputs.codes.double(), indices[:, None])[:, 0] - best
    error = _largest(excess / _squared_lengths(inputs.x, inputs.codes, indices))
    return Verdict(float((indices != expected).double().mean()), error, error > tolerance.distance)


def topk(inputs: Inputs, answer: Tensors, gradients: object, tolerance: Tolerance) -> Verdict:
    """Judge indices and squared distances [N, k]: wrong if the distance at a rank is not that of float64."""
    indices, given = answer
    if not _in_range(indices, inputs.size.k):
        return INVALID
    differing, error = 0, 0.0
    for rows in chunks(inputs):
        x, chosen = inputs.x[rows], indices[rows]
        lengths = _squared_lengths(x, inputs.codes, chosen)
        found = _compare_ranks(-_distances(x, inputs.codes), chosen, -given[rows], lengths)
        differing, error = differing + found[0], max(error, found[1])
    return Verdict(differing / indices.numel(), error, _has_repeats(indices) or error > tolerance.distance)


def largest_products(x: Tensor, codes: Tensor, bias: Tensor | None, answer: Tensors, tolerance: Tolerance) -> Verdict:
    """Judge indices and products x.c + bias [N, k] in any order: wrong if the product at a rank is not that of float64.

    The error is relative to the lengths |x| |c| + |bias|. All arguments but the answer are float64.
    """
    indices, given = answer
    if not _in_range(indices, len(codes)):
        return INVALID
    bias = x.new_zeros(len(codes)) if bias is None else bias
    products = torch.addmm(bias, x, codes.T)
    order = products.gather(1, indices).argsort(dim=1, descending=True)
    lengths = x.norm(dim=1, keepdim=True) * codes.norm(dim=1).amax() + bias.abs().amax()
    differing, error = _compare_ranks(products, indices.gather(1, order), given.gather(1, order), lengths)
    return Verdict(differing / indices.numel(), error, _has_repeats(indices) or error > tolerance.distance)


def _compare_ranks(scores: Tensor, indices: Tensor, given: Tensor, lengths: Tensor) -> tuple[int, float]:
    """The number of indices [N, k] that differ from the largest of the scores [N, K], and the largest error of a score.

    A score errs if the score at its index is not that of its rank, or if the given score is not that at its index.
    """
    expected = scores.topk(indices.shape[1], dim=1)
    found = scores.gather(1, indices)
    error = torch.maximum((found - expected.values).abs(), (given.double() - found).abs())
    return int((indices != expected.indices).sum()), _largest(error / lengths)


def quantized(
    inputs: Inputs,
    answer: Tensors,
    gradients: Tensors,
    tolerance: Tolerance,
    *,
    commitment_cost: float = 1.0,
    normalizes: bool = False,
) -> Verdict:
    """Judge (quantized [N, D], indices [N]) and the gradients of x and, if they are learned by gradient, of the codes.

    The loss is codebook loss + commitment_cost * commitment loss. The indices are judged first; the quantized vectors
    and the gradients are then compared with float64 at these indices.

    Args:
        normalizes: the implementation divides vectors by their length, through which the gradient of x then passes.
    """
    vectors, indices = answer[0], answer[1].clone()  # a tensor of inference mode cannot take part in autograd
    found = nearest(inputs, (indices,), None, tolerance)
    if found.wrong:
        return found

    def formula(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        x, q = normalize(x, dim=1) if normalizes else x, codes[indices]
        return x + (q - x).detach(), mse_loss(q, x.detach()) + commitment_cost * mse_loss(q.detach(), x)

    exact, exact_gradients = differentiated(formula, (inputs.x, inputs.codes), inputs.grad)
    return found.and_values(close((exact, *exact_gradients), (vectors, *gradients), tolerance))


def residual_quantized(inputs: Inputs, answer: Tensors, gradients: Tensors, tolerance: Tolerance) -> Verdict:
    """Judge (quantized [N, D], indices [N, k]) of k levels, and the gradients of x and of the codebooks, if any.

    The loss is the sum of both losses of all levels; the gradient of x counts once for each level.
    """
    vectors, indices = answer[0], answer[1].clone()
    codebooks, residual = inputs.codebooks, inputs.x
    found = Verdict(0.0, 0.0, False)
    for codes, index in zip(codebooks, indices.T, strict=True):
        level = nearest(dataclasses.replace(inputs, x=residual, codes=codes), (index,), None, tolerance)
        differing = (found.differing or 0.0) + (level.differing or 0.0) / len(codebooks)
        found = Verdict(differing, max(found.error, level.error), found.wrong or level.wrong)
        if found.wrong:
            return found
        residual = residual - codes[index]

    def formula(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
        residual, quantized, loss = x, torch.zeros_like(x), x.new_zeros(())
        for codes, index in zip(codebooks, indices.T, strict=True):
            q = codes[index]
            loss = loss + mse_loss(q, residual.detach()) + mse_loss(q.detach(), residual)
            quantized = quantized + residual + (q - residual).detach()
            residual = residual - q.detach()
        return quantized, loss

    exact, exact_gradients = differentiated(formula, (inputs.x, codebooks), inputs.grad)
    return found.and_values(close((exact, *exact_gradients), (vectors, *gradients), tolerance))


def equals(prepare: Prepare) -> Judge:
    """A judge that compares all values and gradients with another implementation, which computes in float64."""

    def judge(inputs: Inputs, answer: Tensors, gradients: Tensors, tolerance: Tolerance) -> Verdict:
        in_float64 = {name: getattr(inputs, name).double() for name in ("x", "codes", "values", "grad")}
        exact, exact_gradients = prepare(dataclasses.replace(inputs, **in_float64)).judged()
        return close((*exact, *exact_gradients), (*answer, *gradients), tolerance)

    return judge


def differentiated(
    formula: Callable[..., Tensor | Tensors], arguments: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor, Tensors]:
    """The first output of a formula and the gradients of its arguments, both in float64. Other outputs are losses."""
    leaves = [each.detach().double().requires_grad_() for each in arguments]
    answer, gradients = differentiable(lambda: formula(*leaves), leaves, gradient).judged()
    return answer[0], gradients


def close(exact: Tensors, actual: Tensors, tolerance: Tolerance) -> Verdict:
    """Judge values by their largest error. Exact values without an actual value, at the end, are ignored."""
    error = max(_relative_error(*pair) for pair in zip(exact, actual, strict=False))
    return Verdict(None, error, error > tolerance.relative)


def distances_at(x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """Squared distances of vectors x [N, D] to the codes at indices [N, k], computed from differences: [N, k]."""
    return torch.stack([(x - codes[column]).square().sum(1) for column in indices.T], dim=1)


def _largest(errors: Tensor) -> float:
    """The largest of errors, or infinity if one is NaN: Python's comparisons would ignore NaN."""
    return float(errors.nan_to_num(nan=float("inf")).max())


def _relative_error(exact: Tensor, actual: Tensor) -> float:
    if exact.shape != actual.shape:
        return float("inf")
    exact, actual = exact.detach().double(), actual.detach().double()
    return _largest((actual - exact).norm() / (float(exact.norm()) or 1.0))


def _squared_lengths(x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """(|x| + |c|)^2 of vectors x [N, D] and their codes at indices [N] or [N, k]."""
    lengths = x.double().norm(dim=1).view(-1, *[1] * (indices.ndim - 1))
    return (lengths + codes.double().norm(dim=1)[indices]).square()


@lru_cache(maxsize=1)
def _nearest(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Squared distance and index of the nearest code in float64, computed once for all implementations."""
    found = [_distances(inputs.x[rows], inputs.codes).min(1) for rows in chunks(inputs)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def chunks(inputs: Inputs) -> list[slice]:
    """Slices of vectors whose float64 distances fit in memory."""
    rows = max(1, _CHUNK_ELEMENTS[inputs.x.device.type] // inputs.size.k)
    return [slice(begin, begin + rows) for begin in range(0, inputs.size.n, rows)]


def _in_range(indices: Tensor, size: int) -> bool:
    return indices.dtype == torch.int64 and bool(((indices >= 0) & (indices < size)).all())


def _has_repeats(indices: Tensor) -> bool:
    return not bool((indices.sort(dim=1).values.diff(dim=1) > 0).all())


def _distances(x: Tensor, codes: Tensor) -> Tensor:
    """Squared distances in float64, [N, K]."""
    x, codes = x.double(), codes.double()
    return torch.addmm(codes.square().sum(1), x, codes.T, alpha=-2).add_(x.square().sum(1, keepdim=True))

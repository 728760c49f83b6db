"""Whether a contender's answer is right: everything is compared with float64 on the same inputs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .entry import Inputs, Tolerance, Verdict

_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}


def nearest(inputs: Inputs, answer: tuple[Tensor, ...], gradients: object, tolerance: Tolerance) -> Verdict:
    """Of indices [N]: wrong where a chosen code is farther than the nearest by more than rounding explains."""
    (indices,) = answer
    if not _in_range(indices, inputs.size.k):
        return Verdict(1.0, float("inf"), True)
    best, expected = _nearest(inputs)
    excess = distances_at(inputs.x.double(), inputs.codes.double(), indices[:, None])[:, 0] - best
    error = _largest(excess / _squared_lengths(inputs.x, inputs.codes, indices))
    return Verdict(float((indices != expected).double().mean()), error, error > tolerance.distance)


def topk(inputs: Inputs, answer: tuple[Tensor, ...], gradients: object, tolerance: Tolerance) -> Verdict:
    """Of indices and squared distances [N, k]: wrong where a rank has not the distance that float64 gives it."""
    indices, given = answer
    if not _in_range(indices, inputs.size.k):
        return Verdict(1.0, float("inf"), True)
    differing, error, repeats = 0, 0.0, False
    for rows in _chunks(inputs):
        x, chosen = inputs.x[rows], indices[rows]
        exact = _distances(x, inputs.codes)
        expected = exact.topk(inputs.size.kept, dim=1, largest=False, sorted=True)
        found = exact.gather(1, chosen)
        off = torch.maximum((found - expected.values).abs(), (given[rows].double() - found).abs())
        differing += int((chosen != expected.indices).sum())
        error = max(error, _largest(off / _squared_lengths(x, inputs.codes, chosen)))
        repeats |= not bool((chosen.sort(dim=1).values.diff(dim=1) > 0).all())
    return Verdict(differing / indices.numel(), error, repeats or error > tolerance.distance)


def largest_products(
    x: Tensor, codes: Tensor, bias: Tensor, answer: tuple[Tensor, Tensor], tolerance: Tolerance
) -> Verdict:
    """Of indices and products x.c + bias [N, k], in any order: wrong where a rank has not the product that float64
    gives it, by more than rounding at the lengths |x| |c| + |b| explains. All but the answer is float64."""
    indices, given = answer
    kept = indices.shape[1]
    if not _in_range(indices, len(codes)):
        return Verdict(1.0, float("inf"), True)
    products = torch.addmm(bias, x, codes.T)
    expected = products.topk(kept, dim=1)
    found = products.gather(1, indices)
    ordered = found.sort(dim=1, descending=True)
    off = torch.maximum((ordered.values - expected.values).abs(), (given.double() - found).abs())
    error = _largest(off / (x.norm(dim=1, keepdim=True) * codes.norm(dim=1).amax() + bias.abs().amax()))
    differing = float((indices.gather(1, ordered.indices) != expected.indices).double().mean())
    repeats = not bool((indices.sort(dim=1).values.diff(dim=1) > 0).all())
    return Verdict(differing, error, repeats or error > tolerance.distance)


def quantized(
    inputs: Inputs,
    answer: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...] | None,
    tolerance: Tolerance,
    *,
    commitment_cost: float = 1.0,
    normalizes: bool = False,
) -> Verdict:
    """Of (quantized [N, D], indices [N]) and the gradients of x and, where the codes learn by it, of the codes.

    The gradients are those of sum (quantized * grad) + mean (q - sg x)^2 + commitment_cost * mean (sg q - x)^2. They
    and the quantized rows are judged given the indices, which are judged by themselves.

    Args:
        normalizes: the contender divides rows by their length, which is 1, and so has no gradient along x.
    """
    rows, indices = answer
    codes = nearest(inputs, (indices,), None, tolerance)
    if codes.wrong:
        return codes
    x, chosen = inputs.x.double(), inputs.codes.double()[indices]
    pull = 2 * (chosen - x) / x.numel()
    grad_codes = torch.zeros_like(inputs.codes, dtype=torch.float64).index_add_(0, indices, pull)
    grad_x = inputs.grad.double() - commitment_cost * pull
    if normalizes:
        grad_x = grad_x - (grad_x * x).sum(1, keepdim=True) * x
    exact = (chosen, grad_x, grad_codes)
    values = close(exact, (rows, *(gradients or ())), tolerance)
    return Verdict(codes.differing, values.error, values.wrong)


def close(exact: tuple[Tensor, ...], actual: tuple[Tensor, ...], tolerance: Tolerance) -> Verdict:
    """Of values: the largest of their errors. Where there are fewer actual values, the last exact ones are left out."""
    error = max(_relative_error(*pair) for pair in zip(exact, actual, strict=False))
    return Verdict(None, error, error > tolerance.relative)


def distances_at(x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """Squared distances of rows x [N, D] to their codes at indices [N, k], by differences: [N, k]."""
    return torch.stack([(x - codes[column]).square().sum(1) for column in indices.T], dim=1)


def _largest(errors: Tensor) -> float:
    """The largest of errors, infinite where one is NaN: in Python's comparisons NaN would be lost."""
    return float(errors.nan_to_num(nan=float("inf")).max())


def _relative_error(exact: Tensor, actual: Tensor) -> float:
    if exact.shape != actual.shape:
        return float("inf")
    exact, actual = exact.detach().double(), actual.detach().double()
    return _largest((actual - exact).norm() / (float(exact.norm()) or 1.0))


def _squared_lengths(x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """(|x| + |c|)^2 of rows x [N, D] and their codes at indices [N] or [N, k]."""
    lengths = x.double().norm(dim=1).view(-1, *[1] * (indices.ndim - 1))
    return (lengths + codes.double().norm(dim=1)[indices]).square()


@lru_cache(maxsize=1)
def _nearest(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Squared distance and index of the nearest code, in float64; once for all contenders."""
    found = [_distances(inputs.x[rows], inputs.codes).min(1) for rows in _chunks(inputs)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _chunks(inputs: Inputs) -> list[slice]:
    """Slices of rows whose distances in float64 fit in memory."""
    rows = max(1, _CHUNK_ELEMENTS[inputs.x.device.type] // inputs.size.k)
    return [slice(begin, begin + rows) for begin in range(0, inputs.size.n, rows)]


def _in_range(indices: Tensor, size: int) -> bool:
    return indices.dtype == torch.int64 and bool(((indices >= 0) & (indices < size)).all())


def _distances(x: Tensor, codes: Tensor) -> Tensor:
    """Squared distances in float64, [N, K]."""
    x, codes = x.double(), codes.double()
    return torch.addmm(codes.square().sum(1), x, codes.T, alpha=-2).add_(x.square().sum(1, keepdim=True))

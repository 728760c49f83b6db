"""Reference of the gradient of `rotation_trick`."""

from __future__ import annotations

import torch
from torch import Tensor

# Norms of x and q are divided by as if they were at least this. A shorter sum of two directions is rounding error, of
# opposite directions: it counts as zero.
_LEAST_NORM = 1e-6


def rotation_trick_bwd(grad: Tensor, x: Tensor, q: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad, source, target = grad.to(dtype), x.to(dtype), q.to(dtype)
    source_norm, target_norm = (
        torch.linalg.vector_norm(each, dim=-1, keepdim=True, dtype=torch.float64).to(dtype) for each in (source, target)
    )
    source, target = source / source_norm.clamp(min=_LEAST_NORM), target / target_norm.clamp(min=_LEAST_NORM)
    between = source + target
    squares = _dot(between, between)
    along_between = torch.where(squares < _LEAST_NORM**2, 0, 2 * _dot(grad, between) / squares)
    rotated = grad - along_between * between + 2 * _dot(grad, target) * source
    return torch.empty_like(x).copy_(rotated * (target_norm / source_norm.clamp(min=_LEAST_NORM)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of the vectors of a and b, [..., 1]."""
    return (a * b).sum(-1, keepdim=True)

"""Linear layers and lengths around a codebook, in float32 or wider whatever autocast says."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..functional.autocast import without_autocast

_SHORTEST = 1e-6


def project(projection: nn.Module | None, x: Tensor) -> Tensor:
    """Apply a linear layer in the dtype of x or a wider one; x itself without one."""
    if not isinstance(projection, nn.Linear):
        return x
    weight, bias = projection.weight, projection.bias
    dtype = torch.promote_types(x.dtype, weight.dtype)
    with without_autocast(x):
        return linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def to_unit_length(x: Tensor) -> Tensor:
    """Vectors [..., D] divided by their lengths, in float32 or wider; below 1e-6 they give zeros and no gradient."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * length.masked_fill(length < _SHORTEST, torch.inf).reciprocal()


def zeros_where_masked(vectors: Tensor, valid: Tensor | None) -> Tensor:
    """Vectors [..., D] with zeros at the masked positions [...]: a masked NaN must not reach a gradient."""
    return vectors if valid is None else torch.where(valid[..., None], vectors, 0)

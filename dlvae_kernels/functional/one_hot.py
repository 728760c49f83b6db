from __future__ import annotations

import torch
from torch import Tensor

from .. import ops  # noqa: F401  (defines torch.ops.dlvae)
from .checks import check_indices, check_size


def one_hot(indices: Tensor, num_codes: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows with a one at each index and zeros elsewhere.

    Args:
        indices: [N] int64 for one-hot rows, or [N, k] for k-hot rows.
        num_codes: K, the width.
        dtype: of the result.
    Returns:
        [N, K] of `dtype`. No gradient.
    Raises:
        ValueError: rank or dtype do not fit, K == 0, or (on the CPU) an index lies outside [0, K).
    """
    check_indices("indices", indices)
    if indices.ndim not in (1, 2):
        raise ValueError(f"indices has shape {tuple(indices.shape)}; it needs [N] or [N, k]")
    num_codes = check_size("num_codes", num_codes, 1)
    return torch.ops.dlvae.one_hot(indices, num_codes, dtype)

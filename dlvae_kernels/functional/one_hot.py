from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .checks import check_indices, check_size


def one_hot(indices: Tensor, num_codes: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """One-hot or k-hot vectors: a one at each index of a vector and zeros elsewhere.

    Args:
        indices: [N] int64 for one-hot vectors, or [N, k] for k-hot vectors; -1 stands for no code, and gives no one.
        num_codes: K, the number of columns.
        dtype: dtype of the result.
    Returns:
        [N, K] of `dtype`. No gradient.
    Raises:
        ValueError: rank or dtype do not fit, K == 0, or (on the CPU) an index lies outside [-1, K).
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> one_hot(torch.tensor([2, 0]), num_codes=3).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    check_indices("indices", indices)
    if indices.ndim not in (1, 2):
        raise ValueError(f"expected indices of shape [N] or [N, k], got {tuple(indices.shape)}; pass indices.flatten()")
    num_codes = check_size("num_codes", num_codes, 1)
    return ops.call("one_hot", indices, num_codes, dtype)

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops  # noqa: F401  (defines torch.ops.dlvae)
from .checks import check_rows, check_size


def topk_codes(x: Tensor, dictionary: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the k dictionary rows nearest to each row of x, by squared Euclidean distance.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        dictionary: [K, D], same device; the dtype of x, or float32 beside a half-precision x.
        k: how many to keep, 1 <= k <= K.
    Returns:
        (indices [..., k] int64, squared distances [..., k] float32, or float64 for float64), ascending by
        (distance, index). NaN as in `nearest_code`. No gradient.
    Raises:
        ValueError: D, dtype or device do not fit, K == 0, or k is not in [1, K].
        BackendUnavailable: the forced backend cannot run these inputs.
    """
    check_rows("x", x, "dictionary", dictionary)
    check_size("k", k, 1, dictionary.shape[0])
    indices, distances = torch.ops.dlvae.topk_codes(x.detach(), dictionary.detach(), k)
    return indices, distances

from __future__ import annotations

from typing import Literal, get_args, overload

import torch
from torch import Tensor

from .. import ops  # noqa: F401  (defines torch.ops.dlvae)
from .checks import check_choice, check_rows

Precision = Literal["float32", "exact", "tf32"]
PRECISIONS = get_args(Precision)


@overload
def nearest_code(
    x: Tensor, codebook: Tensor, *, return_distance: Literal[False] = False, precision: Precision = "float32"
) -> Tensor: ...
@overload
def nearest_code(
    x: Tensor, codebook: Tensor, *, return_distance: Literal[True], precision: Precision = "float32"
) -> tuple[Tensor, Tensor]: ...


def nearest_code(
    x: Tensor, codebook: Tensor, *, return_distance: bool = False, precision: Precision = "float32"
) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the codebook row nearest to each row of x, by squared Euclidean distance.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        codebook: [K, D], same device; the dtype of x, or float32 beside a half-precision x.
        return_distance: also give the squared distances.
        precision: of the search. "float32": the index is that of float64 wherever the two best distances differ by more
            than float32 rounding; "exact": rows whose two best codes are closer than that are searched again by
            differences; "tf32": with ten bits of each feature. On the CPU the search is always exact.
    Returns:
        [...] int64; ties take the lowest index, a row holding NaN gets 0, a NaN code is taken only if all are.
        With `return_distance`, also the squared distances, [...] float32 (float64 for float64). No gradient.
    Raises:
        ValueError: D, dtype or device do not fit, or K == 0.
        BackendUnavailable: the forced backend cannot run these inputs.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1-2.
    """
    check_rows("x", x, "codebook", codebook)
    check_choice("precision", precision, PRECISIONS)
    indices, distances = torch.ops.dlvae.nearest_code(x.detach(), codebook.detach(), return_distance, precision)
    return (indices, distances) if return_distance else indices

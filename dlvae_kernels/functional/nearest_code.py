from __future__ import annotations

from typing import Literal, get_args, overload

from torch import Tensor

from .. import ops
from .checks import check_choice, check_vectors

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
    """Index of the code nearest to each vector of x, by squared Euclidean distance.

    Args:
        x: [..., D], or [..., H, D] with heads; float16, bfloat16, float32 or (reference) float64, any strides.
        codebook: [K, D], or [H, K, D] with one codebook for each head; same device; the dtype of x, or float32 if x has
            half precision.
        return_distance: also return the squared distances.
        precision: precision of the search in Triton; the other backends always return the float64 argmin. "float32":
            the float64 argmin wherever the two best distances differ by more than float32 rounding; "exact": near-ties
            are compared again by differences; "tf32": products of ten bits of each feature.
    Returns:
        [...], or [..., H] with heads, int64; a tie gives the lowest index, a vector that holds NaN index 0, and a code
        that holds NaN is assigned only if all do.
        With `return_distance`, also the squared distances, of the same shape, float32 (float64 for float64). No
        gradient.
    Raises:
        ValueError: D, H, dtype or device do not fit, or K == 0.
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    >>> indices, distances = nearest_code(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), codebook, return_distance=True)
    >>> indices.tolist(), distances.tolist()
    ([0, 1], [1.0, 5.0])

    Two heads, each with its own codebook of two codes:

    >>> codebooks = torch.tensor([[[0.0], [4.0]], [[1.0], [9.0]]])
    >>> nearest_code(torch.tensor([[[1.0], [8.0]], [[3.0], [2.0]]]), codebooks).tolist()
    [[0, 1], [1, 0]]

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1-2.
    """
    check_vectors("x", x, "codebook", codebook, heads=True)
    check_choice("precision", precision, PRECISIONS)
    indices, distances = ops.call("nearest_code", x.detach(), codebook.detach(), return_distance, precision)
    return (indices, distances) if return_distance else indices

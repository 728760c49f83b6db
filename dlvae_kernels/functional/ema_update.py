from __future__ import annotations

import torch
from torch import Tensor

from .. import ops  # noqa: F401  (defines torch.ops.dlvae)
from .checks import (
    check_at_least,
    check_between,
    check_codebook,
    check_floating,
    check_row_indices,
    check_same_device,
    check_size,
    check_tensor,
)


def ema_statistics(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """Sum and number of the rows of x that took each code, packed so that one all-reduce joins them over ranks.

    Args:
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        indices: [...] int64 in [0, K), same device: the code of each row.
        num_codes: K.
    Returns:
        [K, D + 1] float32 (float64 for float64): D columns of sums, then one of counts. No gradient.
        A row that holds NaN or infinity is left out of both: it would stay in the moving averages for good.
    Raises:
        ValueError: shape, dtype or device do not fit, or (on the CPU) an index lies outside [0, K).
    """
    check_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x has no dimensions; it needs [..., D]")
    check_row_indices("indices", indices, "x", x)
    num_codes = check_size("num_codes", num_codes, 1)
    return torch.ops.dlvae.ema_statistics(x.detach(), indices, num_codes)


def ema_step(
    codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, statistics: Tensor, *, decay: float, epsilon: float
) -> None:
    """Move a codebook and its moving averages by the statistics of one batch, in place.

    Args:
        codebook: [K, D] float32 or float64.
        cluster_size: [K], same dtype: moving average of the counts.
        embed_sum: [K, D], same dtype: moving average of the sums.
        statistics: [K, D + 1] of the batch, from `ema_statistics`.
        decay: weight of the past, in [0, 1].
        epsilon: Laplace smoothing of the cluster sizes, >= 0.
    Raises:
        ValueError: an argument does not fit, or requires a gradient while gradients are enabled; nothing has been
            changed.

    Autograd sees the change: a backward that needs the codebook as it was raises, as after `codebook.add_(1)`.

    The averages are kept as they are; only the divisor of codebook = embed_sum / cluster_size is smoothed, and a code
    that no row took stays where it is.

    Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1.
    """
    _check_state(codebook, cluster_size, embed_sum, decay, epsilon)
    check_floating("statistics", statistics)
    expected = (codebook.shape[0], codebook.shape[1] + 1)
    if statistics.shape != expected:
        raise ValueError(f"statistics has shape {tuple(statistics.shape)}; it needs [K, D + 1] = {expected}")
    check_same_device("statistics", statistics, "codebook", codebook)
    torch.ops.dlvae.ema_step(codebook, cluster_size, embed_sum, statistics.detach(), decay, epsilon)
    # Kernels write where autograd does not see it: a backward that needs the old codebook has to raise. A compiled
    # graph does the same by itself.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in (codebook, cluster_size, embed_sum) if not t.is_inference()])


def ema_update(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    decay: float,
    epsilon: float,
) -> None:
    """Update a codebook in place from the rows that took each code: `ema_statistics`, then `ema_step`.

    Args:
        codebook, cluster_size, embed_sum, decay, epsilon: as in `ema_step`.
        x: [..., D] float16, bfloat16, float32 or (reference) float64, any strides.
        indices: [...] int64 in [0, K): the code that each row took.
    Raises:
        ValueError: an argument does not fit; nothing has been changed.

    Rows that hold NaN or infinity are left out.
    """
    _check_state(codebook, cluster_size, embed_sum, decay, epsilon)
    check_floating("x", x)
    if x.ndim == 0 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it needs [..., D] with the D = {codebook.shape[1]} of codebook"
        )
    check_same_device("x", x, "codebook", codebook)
    statistics = ema_statistics(x, indices, codebook.shape[0])
    ema_step(codebook, cluster_size, embed_sum, statistics, decay=decay, epsilon=epsilon)


def _check_state(codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, decay: float, epsilon: float) -> None:
    check_codebook("codebook", codebook)
    if codebook.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"codebook has dtype {codebook.dtype}; moving averages need float32 or float64")
    for name, tensor, shape in (
        ("cluster_size", cluster_size, codebook.shape[:1]),
        ("embed_sum", embed_sum, codebook.shape),
    ):
        check_tensor(name, tensor)
        if tensor.shape != shape or tensor.dtype != codebook.dtype:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype};"
                f" it needs {tuple(shape)} and {codebook.dtype}, as codebook"
            )
        check_same_device(name, tensor, "codebook", codebook)
    for name, tensor in (("codebook", codebook), ("cluster_size", cluster_size), ("embed_sum", embed_sum)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient and would be changed in place; it needs to be a tensor without one, or the"
                " call needs torch.no_grad()"
            )
    check_between("decay", decay, 0, 1)
    check_at_least("epsilon", epsilon, 0)

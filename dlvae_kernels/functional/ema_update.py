from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .checks import (
    check_at_least,
    check_between,
    check_codebook,
    check_floating,
    check_indices_of,
    check_same_device,
    check_size,
    check_sizes,
    check_tensor,
)


def ema_statistics(x: Tensor, indices: Tensor, num_codes: int, *, num_heads: int | None = None) -> Tensor:
    """Sum and number of the vectors of x that are assigned to each code, packed for one all-reduce over ranks.

    Args:
        x: [..., D], or [..., H, D] with heads; float16, bfloat16, float32 or (reference) float64, any strides.
        indices: [...], or [..., H] with heads, int64 in [-1, K), same device: the code that each vector is assigned to;
            -1 stands for no code.
        num_codes: K, of each head.
        num_heads: H, or None without heads.
    Returns:
        [K, D + 1], or [H, K, D + 1] with heads, float32 (float64 for float64): D columns of sums, then one of counts.
        No gradient. A vector without a code is left out of both, and so is one that holds NaN or infinity, which would
        make the moving averages NaN or infinite.
    Raises:
        ValueError: shape, dtype or device do not fit, or (on the CPU) an index lies outside [-1, K).
        BackendUnavailable: the forced backend cannot run these inputs.

    >>> ema_statistics(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 1]), num_codes=2).tolist()
    [[0.0, 0.0, 0.0], [4.0, 6.0, 2.0]]
    """
    check_floating("x", x)
    if x.ndim == 0:
        raise ValueError("expected x of shape [..., D], got ()")
    check_indices_of("indices", indices, "x", x)
    num_codes = check_size("num_codes", num_codes, 1)
    if num_heads is None:
        return ops.call("ema_statistics", x.detach(), indices, num_codes, 1)
    num_heads = check_size("num_heads", num_heads, 1)
    if x.ndim < 2 or x.shape[-2] != num_heads:
        raise ValueError(f"expected x of shape [..., {num_heads}, D] for num_heads={num_heads}, got {tuple(x.shape)}")
    statistics = ops.call("ema_statistics", x.detach(), indices, num_codes, num_heads)
    return statistics.view(num_heads, num_codes, x.shape[-1] + 1)


def ema_step(
    codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, statistics: Tensor, *, decay: float, epsilon: float
) -> None:
    """Update a codebook and its moving averages in place by the statistics of one batch.

    Args:
        codebook: [K, D], or [H, K, D] with heads, float32 or float64.
        cluster_size: [K], or [H, K], same dtype: moving average of the counts.
        embed_sum: [K, D], or [H, K, D], same dtype: moving average of the sums.
        statistics: [K, D + 1], or [H, K, D + 1], of the batch, from `ema_statistics`.
        decay: weight of the past, in [0, 1].
        epsilon: Laplace smoothing of the cluster sizes, >= 0, within each head.
    Raises:
        ValueError: an argument does not fit, or requires a gradient while gradients are enabled; nothing has been
            changed.

    Autograd sees the change: a backward that needs the previous codebook raises, as after `codebook.add_(1)`.

    Laplace smoothing changes only the divisor of codebook = embed_sum / cluster_size, not the averages. A code that no
    vector of the batch is assigned to is not changed.

    >>> codebook, cluster_size = torch.zeros(1, 2), torch.ones(1)
    >>> embed_sum, statistics = torch.zeros(1, 2), torch.tensor([[4.0, 6.0, 2.0]])
    >>> ema_step(codebook, cluster_size, embed_sum, statistics, decay=0.0, epsilon=0.0)
    >>> codebook.tolist()
    [[2.0, 3.0]]

    Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1.
    """
    _check_state(codebook, cluster_size, embed_sum, decay, epsilon)
    check_floating("statistics", statistics)
    expected = (*codebook.shape[:-1], codebook.shape[-1] + 1)
    if statistics.shape != expected:
        dims = "[K, D + 1]" if codebook.ndim == 2 else "[H, K, D + 1]"
        raise ValueError(f"expected statistics of shape {dims} = {expected}, got {tuple(statistics.shape)}")
    check_same_device("statistics", statistics, "codebook", codebook)
    torch.ops.dlvae.ema_step(codebook, cluster_size, embed_sum, statistics.detach(), decay, epsilon)
    # Autograd does not see what kernels write, and a backward that needs the previous codebook has to raise. Compiled
    # graphs increment the versions themselves.
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
    """Update a codebook in place from the vectors assigned to each code: `ema_statistics`, then `ema_step`.

    Args:
        codebook, cluster_size, embed_sum, decay, epsilon: as in `ema_step`.
        x: [..., D], or [..., H, D] with heads; float16, bfloat16, float32 or (reference) float64, any strides.
        indices: [...], or [..., H] with heads, int64 in [-1, K): the code that each vector is assigned to; -1
            stands for no code.
    Raises:
        ValueError: an argument does not fit; nothing has been changed.

    Vectors without a code, and vectors that hold NaN or infinity, are left out.

    >>> codebook, cluster_size = torch.tensor([[0.0], [8.0]]), torch.ones(2)
    >>> embed_sum, x = codebook.clone(), torch.tensor([[2.0], [4.0]])
    >>> ema_update(codebook, cluster_size, embed_sum, x, nearest_code(x, codebook), decay=0.5, epsilon=0.0)
    >>> codebook.tolist(), cluster_size.tolist()
    ([[2.0], [8.0]], [1.5, 0.5])

    Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1.
    """
    _check_state(codebook, cluster_size, embed_sum, decay, epsilon)
    check_floating("x", x)
    check_sizes("x", x, "codebook", codebook)
    check_same_device("x", x, "codebook", codebook)
    num_heads = codebook.shape[0] if codebook.ndim == 3 else None
    statistics = ema_statistics(x, indices, codebook.shape[-2], num_heads=num_heads)
    ema_step(codebook, cluster_size, embed_sum, statistics, decay=decay, epsilon=epsilon)


def _check_state(codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, decay: float, epsilon: float) -> None:
    check_codebook("codebook", codebook, heads=True)
    if codebook.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected codebook of dtype float32 or float64, for moving averages, got {codebook.dtype}")
    for name, tensor, shape in (
        ("cluster_size", cluster_size, codebook.shape[:-1]),
        ("embed_sum", embed_sum, codebook.shape),
    ):
        check_tensor(name, tensor)
        if tensor.shape != shape or tensor.dtype != codebook.dtype:
            raise ValueError(
                f"expected {name} of shape {tuple(shape)} and dtype {codebook.dtype}, as codebook,"
                f" got {tuple(tensor.shape)} and {tensor.dtype}"
            )
        check_same_device(name, tensor, "codebook", codebook)
    for name, tensor in (("codebook", codebook), ("cluster_size", cluster_size), ("embed_sum", embed_sum)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"expected {name} without requires_grad, since it is changed in place; pass {name}.detach() or call"
                " under torch.no_grad()"
            )
    check_between("decay", decay, 0, 1)
    check_at_least("epsilon", epsilon, 0)

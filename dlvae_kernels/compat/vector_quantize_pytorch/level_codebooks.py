"""The codebooks of a residual quantizer, a module for each level: as one tensor, and their updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...functional.residual_quantize import residual_statistics
from ...layers.distributed import all_reduce_sum
from ...layers.level_codebook import sample_residuals
from .codebook import Codebook


def stacked(codebooks: Sequence[Tensor], is_changed: bool) -> Tensor:
    """Codebooks [1, K, D] of one size as [L, K, D]: a copy if a step changes them, or a gradient or a graph needs it.

    Otherwise buffers on the CPU become views of one tensor, so that later calls need no copy; `own_storage` undoes it.
    """
    first = codebooks[0]
    if is_changed or first.requires_grad or _is_traced():
        return torch.cat(list(codebooks))
    if not _are_consecutive(codebooks):
        if not all(_is_movable(codebook) for codebook in codebooks):
            return torch.cat(list(codebooks))
        with torch.no_grad(), torch.inference_mode(False):
            views = torch.cat(list(codebooks)).split(1)
            for codebook, view in zip(codebooks, views, strict=True):
                codebook.data = view
    return first.detach().as_strided((len(codebooks), *first.shape[1:]), first.stride())


def own_storage(codebook: Codebook, *_: object) -> None:
    """Give the codes a storage of their own, which safetensors expects of a state_dict."""
    codes = codebook.embed
    if _is_movable(codes) and codes.untyped_storage().nbytes() > codes.nbytes:
        codes.data = codes.clone()


def _is_movable(codes: Tensor) -> bool:
    """Whether the storage of codes may be replaced: CUDA graphs, optimizers and other processes keep the old one."""
    return type(codes) is Tensor and codes.is_cpu and not codes.is_inference() and not codes.is_shared()


def _is_traced() -> bool:
    is_in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return is_in_graph or torch._C._are_functorch_transforms_active()


def _are_consecutive(codebooks: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors lie in one storage, each behind the one before it."""
    first = codebooks[0]
    storage, size = first.untyped_storage().data_ptr(), first.numel()
    return all(
        each.untyped_storage().data_ptr() == storage
        and each.is_contiguous()
        and each.storage_offset() == first.storage_offset() + level * size
        for level, each in enumerate(codebooks)
    )


@torch.no_grad()
def learn_levels(
    used: Sequence[Codebook],
    vectors: Tensor,
    indices: Tensor,
    codebooks: Tensor,
    levels: int | Tensor,
    mask: Tensor | None,
    is_shared: bool,
) -> None:
    """Update codebooks by the levels that ran.

    Args:
        used: those of the levels that ran, or may have; with `is_shared` one for all levels.
        vectors, indices, codebooks: [..., D], [..., L] and [L, K, D], of the forward.
        levels: the number of levels that ran, or these levels, [L] bool.
        mask: [...] bool: True for a valid vector.
    """
    sync = used[0].is_synchronised
    statistics = residual_statistics(vectors, indices, codebooks)
    ran = torch.arange(len(codebooks), device=vectors.device) < levels if isinstance(levels, int) else levels
    samples: list[Tensor] = []

    def sample(jitter: Tensor) -> Tensor:
        # The random numbers of the first level select the vectors of all: a recomputation draws as many numbers.
        if not samples:
            samples.append(sample_residuals(vectors, indices, codebooks, jitter.flatten(), sync, mask))
        return samples[0]

    if is_shared:
        jitter = torch.rand(codebooks.shape[1], device=vectors.device) if used[0].revives else None
        sampled = None if jitter is None else all_reduce_sum(sample(jitter), sync)
        _learn_shared(used[0], all_reduce_sum(statistics, sync), sampled, ran)
        return
    for level, codebook in enumerate(used):
        part = slice(level, level + 1)
        codebook.learn_from(
            statistics[part],
            lambda jitter, part=part: sample(jitter)[part],  # type: ignore[misc]
            ran=None if isinstance(levels, int) else ran[part],
            ema_update=codebook.ema_update,
        )


def _learn_shared(codebook: Codebook, statistics: Tensor, samples: Tensor | None, ran: Tensor) -> None:
    """Update a codebook by all levels, one after the other, from sums over the ranks [L, K, D + 1]."""
    for level, has_run in zip(statistics.split(1), ran.split(1), strict=True):
        codebook.add_to_averages(level, has_run)
    if codebook.ema_update:
        codebook.update_ema()
    if samples is not None:
        # Each of the levels gives every L-th candidate.
        place = torch.arange(samples.shape[1], device=samples.device)
        codebook.replace_dead(samples[place % ran.sum(), place][None])

"""Feature maps as sequences of vectors [b, n, d], and back."""

from __future__ import annotations

import torch
from torch import Tensor


def to_sequence(x: Tensor, channel_first: bool) -> tuple[Tensor, torch.Size]:
    """A map [b, *spatial, d], or [b, d, *spatial] with channel_first, as [b, n, d]; and its spatial shape."""
    spatial = x.shape[2:] if channel_first else x.shape[1:-1]
    if channel_first:
        return x.flatten(2).transpose(1, 2) if x.ndim > 2 else x[:, None], spatial
    return x.flatten(1, -2) if x.ndim > 2 else x[:, None], spatial


def to_map(vectors: Tensor, spatial: torch.Size, channel_first: bool) -> Tensor:
    """The inverse of `to_sequence`; [b, n, d] becomes [b, *spatial, d] or [b, d, *spatial]."""
    vectors = vectors.reshape(vectors.shape[0], *spatial, vectors.shape[-1])
    return vectors.movedim(-1, 1) if channel_first else vectors


def to_masked_map(
    vectors: Tensor, like: Tensor, valid: Tensor | None, zeros: bool, spatial: torch.Size, channel_first: bool
) -> Tensor:
    """`to_map` of vectors [b, n, d] in the dtype of the sequence `like`; where not `valid` [b, n], zeros or `like`."""
    vectors = vectors.to(like.dtype)
    if valid is not None:
        vectors = torch.where(valid[..., None], vectors, torch.zeros_like(like) if zeros else like)
    return to_map(vectors, spatial, channel_first)


def indices_to_map(indices: Tensor, spatial: torch.Size) -> Tensor:
    """Indices [b, n, ...] as [b, *spatial, ...]."""
    return indices.reshape(indices.shape[0], *spatial, *indices.shape[2:])


def check_features(x: Tensor, dim: int, channel_first: bool, option: str = "channel_first") -> None:
    """Check for a map [b, ..., dim], or [b, dim, ...] with channel_first; the message names the option of the layer.

    Raises:
        ValueError: rank or dim do not fit.
    """
    if x.ndim < 2 or x.shape[1 if channel_first else -1] != dim:
        shapes = [f"[b, ..., {dim}]", f"[b, {dim}, ...]"]
        fits_other = x.ndim >= 2 and x.shape[-1 if channel_first else 1] == dim
        remedy = f"; for {shapes[not channel_first]} pass {option}={not channel_first}" if fits_other else ""
        raise ValueError(f"expected x of shape {shapes[channel_first]}, got {tuple(x.shape)}{remedy}")

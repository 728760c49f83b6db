from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...functional.autocast import without_autocast
from .layout import check_features
from .vector_quantize_pytorch import VectorQuantize


class RandomProjectionQuantizer(nn.Module):
    """Labels for speech pre-training (BEST-RQ): the codes nearest to random projections; nothing is learned.

    The arguments, results and state are those of vector-quantize-pytorch 1.32. `vq`, a cosine `VectorQuantize` with a
    codebook for each projection, is always in eval mode. The labels are computed in float32, autocast or not.

    Args:
        dim: the features of the input.
        codebook_size: K, the number of codes of a codebook.
        codebook_dim: the features of a projection.
        num_codebooks: H, the number of projections and of labels of a vector.
        norm: normalise each vector to mean 0 and variance 1 first.
        kwargs: other arguments of `VectorQuantize`.
    Raises:
        TypeError: an argument is not implemented, or unknown.
        ValueError: an argument is out of its range, or kmeans_init=True, since nothing is learned.

    state_dict: `rand_projs` [H, dim, codebook_dim], and that of `VectorQuantize` under `vq.`.

    >>> quantizer = RandomProjectionQuantizer(dim=32, codebook_size=64, codebook_dim=8, num_codebooks=4)
    >>> quantizer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 4])

    Source: Chiu et al. 2022, arXiv:2202.01855.
    """

    rand_projs: Tensor

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs.get("kmeans_init"):
            raise ValueError("expected kmeans_init=False in RandomProjectionQuantizer, which learns nothing, got True")
        self.num_codebooks = num_codebooks
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        self.vq = VectorQuantize(
            codebook_dim * num_codebooks,
            codebook_size,
            heads=num_codebooks,
            use_cosine_sim=True,
            separate_codebook_per_head=True,
            **kwargs,
        ).eval()

    def train(self, mode: bool = True) -> RandomProjectionQuantizer:
        """Set the mode, but for `vq`, which stays in eval mode."""
        super().train(mode)
        self.vq.eval()
        return self

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """Label vectors.

        Args:
            x: [b, n, dim].
            indices: labels to compare with, int64 of the shape that `forward` returns without them.
        Returns:
            the labels, int64 [b, n, H], or [b, n] for one codebook; with `indices` the cross-entropy of the
            similarities to them, a scalar with a gradient to x.
        Raises:
            ValueError: the shape, dtype or device of x does not fit.
        """
        check_features(x, self.rand_projs.shape[1], channel_first=False)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            projected = torch.einsum("...d,hde->...he", self.norm(x.to(dtype)), self.rand_projs.to(dtype))
        out = self.vq(projected.flatten(-2), indices=indices)
        return out[1]

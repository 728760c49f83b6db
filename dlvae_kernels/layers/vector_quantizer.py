from __future__ import annotations

import torch
from torch import Tensor

from ..functional.vector_quantize import Gradient, VectorQuantizeOutput
from .codebook_state import Init, Threshold
from .quantizer import Encodings, Metric, Quantizer
from .state import StateNames

_NAMES = StateNames(codes="_embedding.weight", cluster_size="_average_use")


class VectorQuantizer(Quantizer):
    """Vector quantizer whose codebook learns by gradient.

    loss = mean (q - sg[x])^2 + commitment_cost * mean (sg[q] - x)^2, with q the nearest code of each position and sg
    the stopped gradient.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the channels of the map.
        commitment_cost: beta, >= 0.
        encodings: the form of the last output of `forward`: "one_hot" (dense [N, K]) or "indices" ([B, *spatial]).
        init: "uniform" in [-1/K, 1/K], "normal", or from the first training batch: "data" (random vectors), "kmeans".
        dead_code_threshold: reinitialise (revive) from the batch a code whose moving average of assigned vectors per
            batch, over all ranks, is below this; 0 disables it. "auto": below a tenth of the mean use of the codes, at
            most 5 % of the codes (at least one) in one step.
        sync: all-reduce statistics over the ranks of torch.distributed whenever it is initialised.
        channel_last: maps are [B, *spatial, D].
        num_heads: H; the channels are divided in H parts, each of which gets a code of its own.
        shared_codebook: all heads use one codebook; otherwise each has its own.
        codebook_dim: the features of a code, where linear layers project D to H * codebook_dim and back; None: D / H.
        metric: "euclidean", or "cosine": vectors and codes have length 1, and so has the (unprojected) output.
        gradient: of quantized to the inputs: "straight_through", or "rotation" (`rotation_trick`).
        index_dtype: of the indices: torch.int64, torch.int32 or torch.uint16.
    Raises:
        ValueError: an argument is out of its range.

    `usage` tells how evenly the codes are used. state_dict: `_embedding.weight` [K, D] ([H, K, D / H] with heads); with
    a dead_code_threshold also `_average_use` [K]; `project_in.*` and `project_out.*` where there is a projection.

    >>> layer = VectorQuantizer(num_embeddings=8, embedding_dim=4, commitment_cost=0.25, encodings="indices")
    >>> loss, quantized, perplexity, indices = layer(torch.randn(2, 4, 5, 5))
    >>> quantized.shape, indices.shape
    (torch.Size([2, 4, 5, 5]), torch.Size([2, 5, 5]))

    Sources: van den Oord et al. 2017, arXiv:1711.00937, eq. 3; dead codes: Dhariwal et al. 2020, arXiv:2005.00341;
    cosine and projections: Yu et al. 2021, arXiv:2110.04627, section 3.2.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment_cost: float,
        *,
        encodings: Encodings = "one_hot",
        init: Init = "uniform",
        dead_code_threshold: Threshold = 0.0,
        sync: bool = True,
        channel_last: bool = False,
        num_heads: int = 1,
        shared_codebook: bool = False,
        codebook_dim: int | None = None,
        metric: Metric = "euclidean",
        gradient: Gradient = "straight_through",
        index_dtype: torch.dtype = torch.int64,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            commitment_cost,
            decay=None,
            epsilon=0.0,
            encodings=encodings,
            init=init,
            dead_code_threshold=dead_code_threshold,
            sync=sync,
            channel_last=channel_last,
            num_heads=num_heads,
            shared_codebook=shared_codebook,
            codebook_dim=codebook_dim,
            metric=metric,
            gradient=gradient,
            index_dtype=index_dtype,
            names=_NAMES,
        )

    def _total_loss(self, out: VectorQuantizeOutput) -> Tensor:
        return out.codebook_loss + self._commitment_cost * out.commitment_loss

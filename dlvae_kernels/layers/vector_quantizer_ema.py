from __future__ import annotations

import torch
from torch import Tensor

from ..functional.vector_quantize import Gradient, VectorQuantizeOutput
from .codebook_state import Init, Threshold
from .quantizer import Encodings, Metric, Quantizer
from .state import StateNames

_NAMES = StateNames(codes="_embedding.weight", cluster_size="_ema_cluster_size", embed_sum="_ema_w")


class VectorQuantizerEMA(Quantizer):
    """Vector quantizer whose codebook follows exponential moving averages of the vectors assigned to each code.

    loss = commitment_cost * mean (sg[q] - x)^2. In training each forward quantizes with the current codebook, then
    updates it. Codebook and averages are buffers in float32 (float64 where that is the default dtype), updated in
    place, and stay float32 after `module.to(torch.bfloat16)`. A code that no vector is assigned to is not
    changed, unless it is dead; vectors that are not finite update nothing. Under activation checkpointing the state
    moves once; see `Codebook`.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the channels of the map.
        commitment_cost: beta, >= 0.
        decay: weight of the past in the averages, in [0, 1].
        epsilon: Laplace smoothing of the cluster sizes, >= 0.
        init: "normal", "uniform" in [-1/K, 1/K], or from the first training batch: "data" (random vectors),
            "kmeans".
        dead_code_threshold: reinitialise (revive) from the batch, with its sum and count, a code whose moving average
            of assigned vectors per batch, over all ranks, is below this; 0 disables it. "auto": below a tenth of the
            mean use of the codes, at most 5 % of the codes (at least one) in one step; see `Codebook`.
        encodings, sync, channel_last, num_heads, shared_codebook, codebook_dim, metric, gradient, index_dtype: as
            in `VectorQuantizer`.
    Raises:
        ValueError: an argument is out of its range.

    `usage` tells how evenly the codes are used. state_dict: `_embedding.weight` [K, D], `_ema_cluster_size` [K],
    `_ema_w` [K, D]; with heads [H, K, D / H] and [H, K]; with a projection `project_in.*` and `project_out.*`.

    >>> layer = VectorQuantizerEMA(num_embeddings=8, embedding_dim=4, commitment_cost=0.25, decay=0.99)
    >>> loss, quantized, perplexity, encodings = layer(torch.randn(2, 4, 5, 5))
    >>> quantized.shape, encodings.shape, layer.cluster_size.shape
    (torch.Size([2, 4, 5, 5]), torch.Size([50, 8]), torch.Size([8]))

    Sources: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; dead codes: Dhariwal et al. 2020,
    arXiv:2005.00341.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment_cost: float,
        decay: float,
        epsilon: float = 1e-5,
        *,
        encodings: Encodings = "one_hot",
        init: Init = "normal",
        dead_code_threshold: Threshold = "auto",
        sync: bool = True,
        channel_last: bool = False,
        num_heads: int = 1,
        shared_codebook: bool = False,
        codebook_dim: int | None = None,
        metric: Metric = "euclidean",
        gradient: Gradient = "straight_through",
        index_dtype: torch.dtype = torch.int64,
    ) -> None:
        if decay is None:
            raise ValueError("expected decay to lie in [0, 1], got None; VectorQuantizer learns by gradient")
        super().__init__(
            num_embeddings,
            embedding_dim,
            commitment_cost,
            decay=decay,
            epsilon=epsilon,
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

    @property
    def decay(self) -> float:
        """The weight of the past in the moving averages."""
        return self._decay  # type: ignore[return-value]

    @property
    def epsilon(self) -> float:
        """The Laplace smoothing of the cluster sizes."""
        return self._epsilon

    @property
    def cluster_size(self) -> Tensor:
        """The moving average of the number of vectors assigned to each code, [K]."""
        return self._sizes

    @property
    def embed_sum(self) -> Tensor:
        """The moving average of the sum of the vectors assigned to each code, [K, D]."""
        return self._sums

    def _total_loss(self, out: VectorQuantizeOutput) -> Tensor:
        return self._commitment_cost * out.commitment_loss

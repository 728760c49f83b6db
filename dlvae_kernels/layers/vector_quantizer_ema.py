from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import check_at_least, check_between
from ..functional.ema_update import ema_statistics, ema_step
from ..functional.vector_quantize import VectorQuantizeOutput
from .codebook_layer import CodebookLayer, Encodings, Init
from .distributed import all_reduce_sum, sample_vectors


class _CodebookBuffer(nn.Module):
    """Holds the codebook under the key `_embedding.weight` of the VQ-VAE notebook, as a buffer and not a parameter."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


class VectorQuantizerEMA(CodebookLayer):
    """Vector quantizer whose codebook follows exponential moving averages of the vectors assigned to each code.

    loss = commitment_cost * mean (sg[q] - x)^2. In training each forward quantizes with the current codebook, then
    updates it. Codebook and averages are buffers in float32 (float64 where that is the default dtype), updated in
    place, and stay float32 after `module.to(torch.bfloat16)`. A code that no vector is assigned to is not
    changed; vectors that are not finite update nothing. For activation checkpointing see `CodebookLayer`.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the channels of the map.
        commitment_cost: beta, >= 0.
        decay: weight of the past in the averages, in [0, 1].
        epsilon: Laplace smoothing of the cluster sizes, >= 0.
        encodings, sync, channel_last: as in `VectorQuantizer`.
        init: "normal", "uniform" in [-1/K, 1/K], or from the first training batch: "data" (random vectors),
            "kmeans".
        dead_code_threshold: reinitialise from the batch, with its sum and count, a code whose moving average of
            assigned vectors per batch, over all ranks, is below this; 0 disables it.
    Raises:
        ValueError: an argument is out of its range.

    state_dict: `_embedding.weight` [K, D], `_ema_cluster_size` [K], `_ema_w` [K, D].

    >>> layer = VectorQuantizerEMA(num_embeddings=8, embedding_dim=4, commitment_cost=0.25, decay=0.99)
    >>> loss, quantized, perplexity, encodings = layer(torch.randn(2, 4, 5, 5))
    >>> quantized.shape, encodings.shape, layer.cluster_size.shape
    (torch.Size([2, 4, 5, 5]), torch.Size([50, 8]), torch.Size([8]))

    Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; dead codes: Dhariwal et al. 2020,
    arXiv:2005.00341.
    """

    _ema_cluster_size: Tensor
    _ema_w: Tensor

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
        dead_code_threshold: float = 0.0,
        sync: bool = True,
        channel_last: bool = False,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            commitment_cost,
            encodings=encodings,
            init=init,
            dead_code_threshold=dead_code_threshold,
            sync=sync,
            channel_last=channel_last,
        )
        check_between("decay", decay, 0, 1)
        check_at_least("epsilon", epsilon, 0)
        self._decay = decay
        self._epsilon = epsilon
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        weight = self._fill_initially(torch.empty(self._num_embeddings, self._embedding_dim, dtype=dtype))
        self._embedding = _CodebookBuffer(weight)
        # Counts and sums start as those of one vector at each code, and so reproduce the codebook.
        self.register_buffer("_ema_cluster_size", torch.ones(self._num_embeddings, dtype=dtype))
        self.register_buffer("_ema_w", weight.clone())

    @property
    def decay(self) -> float:
        """The weight of the past in the moving averages."""
        return self._decay

    @property
    def epsilon(self) -> float:
        """The Laplace smoothing of the cluster sizes."""
        return self._epsilon

    @property
    def cluster_size(self) -> Tensor:
        """The moving average of the number of vectors assigned to each code, [K]."""
        return self._ema_cluster_size

    @property
    def embed_sum(self) -> Tensor:
        """The moving average of the sum of the vectors assigned to each code, [K, D]."""
        return self._ema_w

    def _arguments(self) -> dict[str, Any]:
        arguments = super()._arguments()
        first = {name: arguments.pop(name) for name in ("num_embeddings", "embedding_dim", "commitment_cost")}
        return {**first, "decay": self._decay, "epsilon": self._epsilon, **arguments}

    def _total_loss(self, out: VectorQuantizeOutput) -> Tensor:
        return self._commitment_cost * out.commitment_loss

    @torch.no_grad()
    def _reset_state(self, codes: Tensor) -> None:
        self.codebook.copy_(codes)
        self._ema_w.copy_(codes)
        self._ema_cluster_size.fill_(1)

    @torch.no_grad()
    def _update_state(self, vectors: Tensor, out: VectorQuantizeOutput) -> None:
        dim = self._embedding_dim
        packed = ema_statistics(vectors, out.indices, self._num_embeddings)  # [K, D + 1]
        if self._dead_code_threshold > 0:
            # One all-reduce adds sums, counts and candidates.
            packed = torch.cat([packed, sample_vectors(vectors, self._num_embeddings, self._sync)], dim=1)
        packed = all_reduce_sum(packed, self._sync)
        ema_step(
            self.codebook,
            self._ema_cluster_size,
            self._ema_w,
            packed[:, : dim + 1],
            decay=self._decay,
            epsilon=self._epsilon,
        )
        if self._dead_code_threshold > 0:
            self._reinitialise_dead_codes(*packed[:, dim + 1 :].split([dim, 1], dim=1))

    def _reinitialise_dead_codes(self, candidates: Tensor, is_valid: Tensor) -> None:
        """Replace each dead code, its sum and its count by a valid candidate, so that the next update keeps it."""
        threshold = self._dead_code_threshold
        is_dead = (self._ema_cluster_size[:, None] < threshold) & (is_valid > 0)
        self.codebook.copy_(torch.where(is_dead, candidates, self.codebook))
        self._ema_w.copy_(torch.where(is_dead, candidates * threshold, self._ema_w))
        self._ema_cluster_size.masked_fill_(is_dead.squeeze(1), threshold)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The layer keeps its own float32 buffers, even where load_state_dict assigns the caller's tensors.
        for name in ("_embedding.weight", "_ema_cluster_size", "_ema_w"):
            if (value := state_dict.get(prefix + name)) is not None:
                dtype = torch.promote_types(value.dtype, torch.float32)
                state_dict[prefix + name] = value.detach().to(dtype, copy=True)
        size, total = (state_dict.get(prefix + name) for name in ("_ema_cluster_size", "_ema_w"))
        if size is not None and total is not None and total.shape[:1] == size.shape:
            # The layer of the VQ-VAE notebook starts with counts of 0 and random sums; a sum without vectors is 0.
            total.masked_fill_(size[:, None] == 0, 0)
        super()._load_from_state_dict(state_dict, prefix, *args)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.vector_quantize import VectorQuantizeOutput
from .codebook_layer import CodebookLayer, Encodings, Init
from .distributed import all_reduce_sum, sample_vectors

# Weight of the past in the moving average of the count of a code, by which dead codes are found.
_USE_DECAY = 0.99


class _Codebook(nn.Embedding):
    """Holds the codebook under the key `_embedding.weight`, as the VQ-VAE notebook does."""

    def reset_parameters(self) -> None:
        """Do nothing: the enclosing layer initialises the codebook, and a model may reset its modules in any order."""


class VectorQuantizer(CodebookLayer):
    """Vector quantizer whose codebook learns by gradient.

    loss = mean (q - sg[x])^2 + commitment_cost * mean (sg[q] - x)^2, with q the nearest code of each position and sg
    the stopped gradient.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the channels of the map.
        commitment_cost: beta, >= 0.
        encodings: the form of the last output of `forward`: "one_hot" (dense [N, K]) or "indices" ([B, *spatial]).
        init: "uniform" in [-1/K, 1/K], "normal", or from the first training batch: "data" (random vectors), "kmeans".
        dead_code_threshold: reinitialise from the batch a code whose moving average of assigned vectors per batch,
            over all ranks, is below this; 0 disables it.
        sync: all-reduce statistics over the ranks of torch.distributed whenever it is initialised.
        channel_last: maps are [B, *spatial, D].
    Raises:
        ValueError: an argument is out of its range.

    state_dict: `_embedding.weight` [K, D]; with a dead_code_threshold also `_average_use` [K].

    >>> layer = VectorQuantizer(num_embeddings=8, embedding_dim=4, commitment_cost=0.25, encodings="indices")
    >>> loss, quantized, perplexity, indices = layer(torch.randn(2, 4, 5, 5))
    >>> quantized.shape, indices.shape
    (torch.Size([2, 4, 5, 5]), torch.Size([2, 5, 5]))

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 3; dead codes: Dhariwal et al. 2020, arXiv:2005.00341.
    """

    _average_use: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment_cost: float,
        *,
        encodings: Encodings = "one_hot",
        init: Init = "uniform",
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
        self._embedding = _Codebook(self._num_embeddings, self._embedding_dim)
        with torch.no_grad():
            self._fill_initially(self.codebook)
        if dead_code_threshold > 0:
            self.register_buffer("_average_use", torch.ones(self._num_embeddings))

    def _total_loss(self, out: VectorQuantizeOutput) -> Tensor:
        return out.codebook_loss + self._commitment_cost * out.commitment_loss

    @torch.no_grad()
    def _reset_state(self, codes: Tensor) -> None:
        self.codebook.copy_(codes)
        if self._dead_code_threshold > 0:
            self._average_use.fill_(1)

    @torch.no_grad()
    def _update_state(self, vectors: Tensor, out: VectorQuantizeOutput) -> None:
        threshold = self._dead_code_threshold
        if threshold == 0:
            return
        sampled = sample_vectors(vectors, self._num_embeddings, self._sync)
        packed = all_reduce_sum(torch.cat([sampled, out.counts[:, None].to(sampled.dtype)], dim=1), self._sync)
        candidates, is_valid, counts = packed.split([self._embedding_dim, 1, 1], dim=1)
        self._average_use.lerp_(counts.squeeze(1).to(self._average_use.dtype), 1 - _USE_DECAY)
        is_dead = (self._average_use[:, None] < threshold) & (is_valid > 0)
        self.codebook.copy_(torch.where(is_dead, candidates.to(self.codebook.dtype), self.codebook))
        self._average_use.masked_fill_(is_dead.squeeze(1), threshold)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A layer that counts assignments loads the checkpoint of one that does not, and the reverse.
        if self._dead_code_threshold > 0:
            state_dict.setdefault(prefix + "_average_use", self._average_use)
        else:
            state_dict.pop(prefix + "_average_use", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

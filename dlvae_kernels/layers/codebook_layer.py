"""What both vector quantizers share: arguments, initialisation, re-drawing of dead codes, and the way of a map."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional.checks import check_at_least, check_choice, check_indices
from ..functional.ema_update import ema_statistics
from ..functional.gather_codes import gather_codes
from ..functional.nearest_code import nearest_code
from ..functional.one_hot import one_hot
from ..functional.vector_quantize import VectorQuantizeOutput, vector_quantize
from .distributed import all_reduce_sum, sample_rows
from .maps import codes_to_map, map_to_rows, rows_to_map

Encodings = Literal["one_hot", "indices"]
Init = Literal["uniform", "normal", "data", "kmeans"]
QuantizerOutput = tuple[Tensor, Tensor, Tensor, Tensor]

_KMEANS_ITERATIONS = 10


class CodebookLayer(nn.Module):
    """Base of the vector quantizers; `_embedding.weight` is the codebook [K, D]."""

    _embedding: nn.Module

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment_cost: float,
        *,
        encodings: Encodings,
        init: Init,
        dead_code_threshold: float,
        sync: bool,
        channel_last: bool,
    ) -> None:
        super().__init__()
        check_at_least("num_embeddings", num_embeddings, 1)
        check_at_least("embedding_dim", embedding_dim, 1)
        check_at_least("commitment_cost", commitment_cost, 0)
        check_at_least("dead_code_threshold", dead_code_threshold, 0)
        check_choice("encodings", encodings, ("one_hot", "indices"))
        check_choice("init", init, ("uniform", "normal", "data", "kmeans"))
        self._num_embeddings = num_embeddings
        self._embedding_dim = embedding_dim
        self._commitment_cost = commitment_cost
        self._encodings = encodings
        self._init = init
        self._dead_code_threshold = dead_code_threshold
        self._sync = sync
        self._channel_last = channel_last
        # Whether the first training batch still has to give the codebook; a loaded state_dict settles it.
        self._awaits_data = init in ("data", "kmeans")

    @property
    def codebook(self) -> Tensor:
        """The codebook, [K, D]."""
        return self._embedding.weight  # type: ignore[return-value]

    def forward(self, inputs: Tensor) -> QuantizerOutput:
        """Quantize a map.

        Args:
            inputs: [B, D, *spatial], or [B, *spatial, D] with channel_last, float16, bfloat16 or float32.
        Returns:
            loss: scalar float32.
            quantized: shape, dtype and strides of inputs, with the straight-through gradient.
            perplexity: scalar float32, of the codes that this batch took, in [1, K].
            encodings: one-hot rows [B * positions, K] float32, or with encodings="indices" int64 [B, *spatial].
        Raises:
            ValueError: rank, D, dtype or device do not fit; nothing has been changed.
        """
        rows = self._rows(inputs)
        if self._awaits_data and self.training:
            self._set_codebook(self._codes_from_data(rows))
            self._awaits_data = False
        out = vector_quantize(rows, self.codebook)
        if self.training and not _is_recomputation():
            self._update(rows, out)
        quantized = rows_to_map(out.quantized, inputs, self._channel_last)
        return self._loss(out), quantized, _perplexity(out.counts), self._encode_output(out.indices, inputs)

    def encode(self, inputs: Tensor) -> Tensor:
        """Indices of the nearest codes, int64 [B, *spatial]; `inputs` as in `forward`."""
        return self._index_map(nearest_code(self._rows(inputs), self.codebook), inputs)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes at int64 indices [B, *spatial], as a map [B, D, *spatial] ([B, *spatial, D] with channel_last).

        Raises:
            ValueError: not int64, no dimensions, or (on the CPU) an index lies outside [0, K).
        """
        check_indices("indices", indices)
        if indices.ndim == 0:
            raise ValueError("indices has no dimensions; it needs [B, *spatial]")
        return codes_to_map(gather_codes(self.codebook, indices), self._channel_last)

    def extra_repr(self) -> str:
        return (
            f"num_embeddings={self._num_embeddings}, embedding_dim={self._embedding_dim},"
            f" commitment_cost={self._commitment_cost}"
        )

    def _rows(self, inputs: Tensor) -> Tensor:
        """Check a map and view it as rows [B, S, D]."""
        return map_to_rows("inputs", inputs, "codebook", self.codebook, self._channel_last)

    def _loss(self, out: VectorQuantizeOutput) -> Tensor:
        raise NotImplementedError

    def _update(self, rows: Tensor, out: VectorQuantizeOutput) -> None:
        """Move the state of the layer after a training batch."""
        raise NotImplementedError

    def _set_codebook(self, codes: Tensor) -> None:
        """Take `codes` [K, D] as the codebook."""
        raise NotImplementedError

    def _initialize(self, weight: Tensor) -> Tensor:
        """Fill a codebook [K, D]; with init "data" or "kmeans" this holds until the first training batch."""
        bound = 1 / self._num_embeddings
        return weight.normal_() if self._init == "normal" else weight.uniform_(-bound, bound)

    @torch.no_grad()
    def _codes_from_data(self, rows: Tensor) -> Tensor:
        """Random rows of the batch over all ranks, moved by k-means where asked for: [K, D]."""
        codes = all_reduce_sum(sample_rows(rows, self._num_embeddings, self._sync), self._sync)
        for _ in range(_KMEANS_ITERATIONS if self._init == "kmeans" else 0):
            statistics = ema_statistics(rows, nearest_code(rows, codes), self._num_embeddings)
            sums, counts = all_reduce_sum(statistics, self._sync).split([self._embedding_dim, 1], dim=1)
            codes = torch.where(counts > 0, sums / counts, codes)
        return codes

    def _encode_output(self, indices: Tensor, inputs: Tensor) -> Tensor:
        if self._encodings == "one_hot":
            return one_hot(indices.flatten(), self._num_embeddings)
        return self._index_map(indices, inputs)

    def _index_map(self, indices: Tensor, inputs: Tensor) -> Tensor:
        spatial = inputs.shape[1:-1] if self._channel_last else inputs.shape[2:]
        return indices.view(inputs.shape[0], *spatial)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._awaits_data = False


def _is_recomputation() -> bool:
    """Whether this forward runs inside a backward, where activation checkpointing repeats it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the shares of the codes; 1 for an empty batch."""
    share = counts.float() / counts.sum().clamp(min=1)
    return torch.exp(-(share * torch.log(share + 1e-10)).sum())

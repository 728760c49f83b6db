"""Base of both vector quantizers: arguments, initialisation of the codebook, and the forward over a feature map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional.checks import check_at_least, check_choice, check_indices, check_size
from ..functional.ema_update import ema_statistics
from ..functional.gather_codes import gather_codes
from ..functional.nearest_code import nearest_code
from ..functional.one_hot import one_hot
from ..functional.vector_quantize import VectorQuantizeOutput, vector_quantize
from .distributed import all_reduce_sum, num_ranks, sample_vectors
from .maps import codes_to_map, map_to_vectors, vectors_to_map

Encodings = Literal["one_hot", "indices"]
Init = Literal["uniform", "normal", "data", "kmeans"]
QuantizerOutput = tuple[Tensor, Tensor, Tensor, Tensor]

_KMEANS_ITERATIONS = 10


class CodebookLayer(nn.Module):
    """Base of the vector quantizers; `_embedding.weight` is the codebook [K, D].

    A subclass defines `_total_loss`, `_update_state` and `_reset_state`.

    Activation checkpointing recomputes a forward inside the backward; only the first forward updates the state of the
    layer. The recomputation sees the updated codebook: keep the layer outside a checkpointed region where gradients
    must be exact. Do not compile a layer by itself inside such a region, because compiled code cannot detect the
    recomputation.
    """

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
        num_embeddings = check_size("num_embeddings", num_embeddings, 1)
        embedding_dim = check_size("embedding_dim", embedding_dim, 1)
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
        # True until the first training batch has initialised the codebook, or it has been set otherwise.
        self._is_uninitialised = init in ("data", "kmeans")
        # Recomputation under activation checkpointing must consume the same random numbers as the step did.
        self._initialised_in_last_step = False

    @property
    def codebook(self) -> Tensor:
        """The codebook, [K, D]."""
        return self._embedding.weight  # type: ignore[return-value]

    @property
    def num_embeddings(self) -> int:
        """K, the number of codes."""
        return self._num_embeddings

    @property
    def embedding_dim(self) -> int:
        """D, the number of features of a code."""
        return self._embedding_dim

    @property
    def commitment_cost(self) -> float:
        """The weight of the commitment loss."""
        return self._commitment_cost

    def forward(self, inputs: Tensor) -> QuantizerOutput:
        """Quantize a map.

        Args:
            inputs: [B, D, *spatial], or [B, *spatial, D] with channel_last, float16, bfloat16 or float32.
        Returns:
            loss: scalar float32.
            quantized: shape, dtype and (where they are dense) strides of inputs, with the straight-through gradient.
            perplexity: scalar float32 in [1, K], of the codes that this batch is assigned to.
            encodings: one-hot vectors [B * positions, K] float32, or with encodings="indices" int64 [B, *spatial].
        Raises:
            ValueError: rank, D, dtype or device do not fit, or the layer is exported in train mode while its codebook
                is uninitialised or ranks all-reduce; nothing has been changed.
        """
        vectors = self._as_vectors(inputs)
        if self.training and torch.compiler.is_exporting():
            self._check_exportable()
        updates = self.training and not _is_recomputation()
        if updates:
            self._initialise_from_data(vectors)
        elif self.training:
            self._consume_random_numbers(vectors)
        out = vector_quantize(vectors, self.codebook)
        if updates:
            self._update_state(vectors, out)
        quantized = vectors_to_map(out.quantized, inputs, self._channel_last)
        return self._total_loss(out), quantized, _perplexity(out.counts), self._encodings_of(out.indices, inputs)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the codebook and all statistics anew, as the constructor does; call it after `to_empty`."""
        self._is_uninitialised = self._init in ("data", "kmeans")
        self._initialised_in_last_step = False
        self._reset_state(self._fill_initially(torch.empty_like(self.codebook)))

    def encode(self, inputs: Tensor) -> Tensor:
        """Indices of the nearest codes, int64 [B, *spatial]; `inputs` as in `forward`."""
        return self._index_map(nearest_code(self._as_vectors(inputs), self.codebook), inputs)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes at int64 indices [B, *spatial], as a map [B, D, *spatial] ([B, *spatial, D] with channel_last).

        The map has the dtype of the codebook.

        Raises:
            ValueError: not int64, no dimensions, or (on the CPU) an index lies outside [-1, K).
        """
        check_indices("indices", indices)
        if indices.ndim == 0:
            raise ValueError("expected indices of shape [B, *spatial], got (); pass indices[None]")
        return codes_to_map(gather_codes(self.codebook, indices), self._channel_last)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())

    def _arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {
            "num_embeddings": self._num_embeddings,
            "embedding_dim": self._embedding_dim,
            "commitment_cost": self._commitment_cost,
            "encodings": self._encodings,
            "init": self._init,
            "dead_code_threshold": self._dead_code_threshold,
            "sync": self._sync,
            "channel_last": self._channel_last,
        }

    def _total_loss(self, out: VectorQuantizeOutput) -> Tensor:
        """Combine the losses of the codebook and of the commitment into the loss that `forward` returns."""
        raise NotImplementedError

    def _update_state(self, vectors: Tensor, out: VectorQuantizeOutput) -> None:
        """Update buffers and reinitialise dead codes after a training batch of vectors [..., D]."""
        raise NotImplementedError

    def _reset_state(self, codes: Tensor) -> None:
        """Copy `codes` [K, D] into the codebook, and reset all statistics."""
        raise NotImplementedError

    def _check_exportable(self) -> None:
        """Refuse to export a graph that would repeat what happens in one training step only."""
        if self._is_uninitialised:
            raise ValueError(
                f"{type(self).__name__} cannot be exported in train mode before a training batch has initialised its"
                f" codebook (init={self._init!r}): run one training step first, or call .eval()"
            )
        if num_ranks(self._sync) > 1:
            raise ValueError(
                f"{type(self).__name__} cannot be exported in train mode while ranks all-reduce its statistics: export"
                " it in one process, construct it with sync=False, or call .eval()"
            )

    def _as_vectors(self, inputs: Tensor) -> Tensor:
        """Check a map and view it as vectors [B, S, D]."""
        return map_to_vectors("inputs", inputs, "codebook", self.codebook, self._channel_last)

    def _fill_initially(self, weight: Tensor) -> Tensor:
        """Fill a codebook [K, D]; an uninitialised one is zero until the first training batch, also in a checkpoint."""
        bound = 1 / self._num_embeddings
        if self._is_uninitialised:
            return weight.zero_()
        return weight.normal_() if self._init == "normal" else weight.uniform_(-bound, bound)

    @torch.no_grad()
    def _initialise_from_data(self, vectors: Tensor) -> None:
        """Set an uninitialised codebook to random vectors of the batch over all ranks, or to their k-means."""
        self._initialised_in_last_step = False
        # The codebook may have been set in place, as torch.distributed.checkpoint does: then it is not all zeros.
        # Compiled code cannot branch on values; torch.where below restores a codebook that was set.
        if self._is_uninitialised and not torch.compiler.is_compiling() and self.codebook.any():
            self._is_uninitialised = False
        # A rank with no vectors still joins the all-reduce.
        if not self._is_uninitialised or (vectors.numel() == 0 and num_ranks(self._sync) == 1):
            return
        sampled = all_reduce_sum(sample_vectors(vectors, self._num_embeddings, self._sync), self._sync)
        is_valid = sampled[:, -1] > 0
        valid_first = is_valid.argsort(descending=True, stable=True)
        # Valid vectors are repeated if there are fewer than codes.
        position = torch.arange(self._num_embeddings, device=vectors.device) % is_valid.sum().clamp(min=1)
        codes = sampled[valid_first[position], :-1]
        for _ in range(_KMEANS_ITERATIONS if self._init == "kmeans" else 0):
            statistics = ema_statistics(vectors, nearest_code(vectors, codes), self._num_embeddings)
            sums, counts = all_reduce_sum(statistics, self._sync).split([self._embedding_dim, 1], dim=1)
            codes = torch.where(counts > 0, sums / counts, codes)
        before = [(tensor, tensor.clone()) for tensor in (*self.parameters(), *self.buffers())]
        is_set = self.codebook.any()
        self._reset_state(codes)
        for tensor, old in before:
            tensor.copy_(torch.where(is_set, old, tensor))
        self._initialised_in_last_step = True
        self._is_uninitialised = False

    def _consume_random_numbers(self, vectors: Tensor) -> None:
        """Draw as many random numbers as the first forward did, so that the random stream continues as after it."""
        for _ in range(int(self._initialised_in_last_step) + int(self._dead_code_threshold > 0)):
            sample_vectors(vectors, self._num_embeddings, self._sync)

    def _encodings_of(self, indices: Tensor, inputs: Tensor) -> Tensor:
        if self._encodings == "one_hot":
            return one_hot(indices.flatten(), self._num_embeddings)
        return self._index_map(indices, inputs)

    def _index_map(self, indices: Tensor, inputs: Tensor) -> Tensor:
        spatial = inputs.shape[1:-1] if self._channel_last else inputs.shape[2:]
        return indices.view(inputs.shape[0], *spatial)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodebookLayer:
        """Move or cast as any module does, but keep buffers in float32 or wider: half precision would lose counts."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype in (torch.float16, torch.bfloat16):
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, before[name].to(buffer.device, torch.float32))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        weight = state_dict.get(prefix + "_embedding.weight")
        if weight is not None and weight.shape == self.codebook.shape:
            is_zero = weight.is_meta or not weight.any()
            self._is_uninitialised = self._init in ("data", "kmeans") and is_zero


def _is_recomputation() -> bool:
    """Whether this forward runs inside a backward, where activation checkpointing recomputes it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the frequencies of the codes; 1 for an empty batch."""
    frequency = counts.float() / counts.sum().clamp(min=1)
    return torch.exp(-(frequency * torch.log(frequency + 1e-10)).sum())

"""What both vector quantizers share: arguments, initialisation, re-drawing of dead codes, and the way of a map."""

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
from .distributed import all_reduce_sum, num_ranks, sample_rows
from .maps import codes_to_map, map_to_rows, rows_to_map

Encodings = Literal["one_hot", "indices"]
Init = Literal["uniform", "normal", "data", "kmeans"]
QuantizerOutput = tuple[Tensor, Tensor, Tensor, Tensor]

_KMEANS_ITERATIONS = 10


class CodebookLayer(nn.Module):
    """Base of the vector quantizers; `_embedding.weight` is the codebook [K, D].

    Activation checkpointing repeats a forward inside the backward; the state of the layer moves at the first only.
    The repeated forward sees the codebook as it has become: keep the layer outside a checkpointed region where
    gradients must be exact, and do not compile a layer alone inside one, where the repetition cannot be told.
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
        # Whether a training batch has to give the codebook, if it is still all zeros by then.
        self._awaits_data = init in ("data", "kmeans")
        # Whether the last training batch did: its repetition by activation checkpointing draws the same numbers.
        self._took_data = False

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
            quantized: shape, dtype and (where they are dense) strides of inputs, with the straight-through gradient.
            perplexity: scalar float32, of the codes that this batch took, in [1, K].
            encodings: one-hot rows [B * positions, K] float32, or with encodings="indices" int64 [B, *spatial].
        Raises:
            ValueError: rank, D, dtype or device do not fit, or the layer is exported in train mode while its codebook
                awaits data or ranks all-reduce; nothing has been changed.
        """
        rows = self._rows(inputs)
        if self.training and torch.compiler.is_exporting():
            self._check_export()
        moves = self.training and not _is_repetition()
        if moves:
            self._take_data(rows)
        elif self.training:
            self._repeat_draws(rows)
        out = vector_quantize(rows, self.codebook)
        if moves:
            self._update(rows, out)
        quantized = rows_to_map(out.quantized, inputs, self._channel_last)
        return self._loss(out), quantized, _perplexity(out.counts), self._encode_output(out.indices, inputs)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the codebook and all statistics anew, as the constructor does; after `to_empty` too."""
        self._awaits_data = self._init in ("data", "kmeans")
        self._took_data = False
        self._reset(self._initialize(torch.empty_like(self.codebook)))

    def encode(self, inputs: Tensor) -> Tensor:
        """Indices of the nearest codes, int64 [B, *spatial]; `inputs` as in `forward`."""
        return self._index_map(nearest_code(self._rows(inputs), self.codebook), inputs)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes at int64 indices [B, *spatial], as a map [B, D, *spatial] ([B, *spatial, D] with channel_last).

        It has the dtype of the codebook.

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

    def _loss(self, out: VectorQuantizeOutput) -> Tensor:
        raise NotImplementedError

    def _update(self, rows: Tensor, out: VectorQuantizeOutput) -> None:
        """Move the state of the layer after a training batch."""
        raise NotImplementedError

    def _reset(self, codes: Tensor) -> None:
        """Take `codes` [K, D] as the codebook, and begin all statistics anew."""
        raise NotImplementedError

    def _check_export(self) -> None:
        """Refuse an exported graph that would repeat what happens at one training step only."""
        if self._awaits_data:
            raise ValueError(
                f"{type(self).__name__} cannot be exported in train mode before a training batch has initialised its"
                f" codebook (init={self._init!r}): run one training step first, or call .eval()"
            )
        if num_ranks(self._sync) > 1:
            raise ValueError(
                f"{type(self).__name__} cannot be exported in train mode while ranks all-reduce its statistics: export"
                " it in one process, construct it with sync=False, or call .eval()"
            )

    def _rows(self, inputs: Tensor) -> Tensor:
        """Check a map and view it as rows [B, S, D]."""
        return map_to_rows("inputs", inputs, "codebook", self.codebook, self._channel_last)

    def _initialize(self, weight: Tensor) -> Tensor:
        """Fill a codebook [K, D]; one that awaits data is zero until then, which a checkpoint of it shows."""
        bound = 1 / self._num_embeddings
        if self._awaits_data:
            return weight.zero_()
        return weight.normal_() if self._init == "normal" else weight.uniform_(-bound, bound)

    @torch.no_grad()
    def _take_data(self, rows: Tensor) -> None:
        """Where the codebook awaits data: take random rows of the batch over all ranks, moved by k-means if asked."""
        self._took_data = False
        # A codebook may have been set in place since, as torch.distributed.checkpoint does; only zeros await data. A
        # compiled graph cannot look, and chooses at the end.
        if self._awaits_data and not torch.compiler.is_compiling() and self.codebook.any():
            self._awaits_data = False
        # An empty rank among several takes part: it gets the rows of the others.
        if not self._awaits_data or (rows.numel() == 0 and num_ranks(self._sync) == 1):
            return
        sampled = all_reduce_sum(sample_rows(rows, self._num_embeddings, self._sync), self._sync)
        is_given = sampled[:, -1] > 0
        given_first = is_given.argsort(descending=True, stable=True)
        place = torch.arange(self._num_embeddings, device=rows.device) % is_given.sum().clamp(min=1)
        codes = sampled[given_first[place], :-1]
        for _ in range(_KMEANS_ITERATIONS if self._init == "kmeans" else 0):
            statistics = ema_statistics(rows, nearest_code(rows, codes), self._num_embeddings)
            sums, counts = all_reduce_sum(statistics, self._sync).split([self._embedding_dim, 1], dim=1)
            codes = torch.where(counts > 0, sums / counts, codes)
        before = [(tensor, tensor.clone()) for tensor in (*self.parameters(), *self.buffers())]
        is_set = self.codebook.any()
        self._reset(codes)
        for tensor, old in before:
            tensor.copy_(torch.where(is_set, old, tensor))
        self._took_data = True
        self._awaits_data = False

    def _repeat_draws(self, rows: Tensor) -> None:
        """Draw as many random numbers as the forward that is repeated, so that what follows draws the same."""
        for _ in range(int(self._took_data) + int(self._dead_code_threshold > 0)):
            sample_rows(rows, self._num_embeddings, self._sync)

    def _encode_output(self, indices: Tensor, inputs: Tensor) -> Tensor:
        if self._encodings == "one_hot":
            return one_hot(indices.flatten(), self._num_embeddings)
        return self._index_map(indices, inputs)

    def _index_map(self, indices: Tensor, inputs: Tensor) -> Tensor:
        spatial = inputs.shape[1:-1] if self._channel_last else inputs.shape[2:]
        return indices.view(inputs.shape[0], *spatial)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodebookLayer:
        """Move or cast as any module, but keep the buffers, which count, in float32 or wider."""
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
            self._awaits_data = self._init in ("data", "kmeans") and is_zero


def _is_repetition() -> bool:
    """Whether this forward runs inside a backward, where activation checkpointing repeats it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the shares of the codes; 1 for an empty batch."""
    share = counts.float() / counts.sum().clamp(min=1)
    return torch.exp(-(share * torch.log(share + 1e-10)).sum())

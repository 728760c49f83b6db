"""The base of both vector quantizers: the forward over a feature map, with heads, projections and a mask."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..functional.checks import check_at_least, check_choice, check_size
from ..functional.ema_update import ema_statistics
from ..functional.gather_codes import gather_codes
from ..functional.nearest_code import nearest_code
from ..functional.one_hot import one_hot
from ..functional.vector_quantize import GRADIENTS, Gradient, VectorQuantizeOutput, vector_quantize
from .codebook import Codebook
from .codebook_state import Init, Threshold
from .distributed import sample_vectors
from .maps import (
    check_holds_no_code,
    check_index_dtype,
    codes_to_map,
    long_indices,
    map_to_vectors,
    mask_to_vectors,
    spatial_shape,
    vectors_to_map,
)
from .projection import project, to_unit_length, zeros_where_masked
from .state import StateNames
from .usage import perplexity_of

Encodings = Literal["one_hot", "indices"]
Metric = Literal["euclidean", "cosine"]


class VectorQuantizerOutput(NamedTuple):
    """The result of a vector quantizer, whose `forward` describes the fields.

    >>> VectorQuantizerOutput._fields
    ('loss', 'quantized', 'perplexity', 'encodings')
    """

    loss: Tensor
    quantized: Tensor
    perplexity: Tensor
    encodings: Tensor


class Quantizer(Codebook):
    """A quantizer of feature maps with one codebook, or one for each head; a subclass defines `_total_loss`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment_cost: float,
        *,
        decay: float | None,
        epsilon: float,
        encodings: Encodings,
        init: Init,
        dead_code_threshold: Threshold,
        sync: bool,
        channel_last: bool,
        num_heads: int,
        shared_codebook: bool,
        codebook_dim: int | None,
        metric: Metric,
        gradient: Gradient,
        index_dtype: torch.dtype,
        names: StateNames,
    ) -> None:
        num_embeddings = check_size("num_embeddings", num_embeddings, 1)
        embedding_dim = check_size("embedding_dim", embedding_dim, 1)
        num_heads = check_size("num_heads", num_heads, 1)
        if codebook_dim is None:
            if embedding_dim % num_heads:
                raise ValueError(
                    f"expected embedding_dim to be a multiple of num_heads, got {embedding_dim} and {num_heads};"
                    " pass codebook_dim, the number of features of each head, for a projection"
                )
            num_features = embedding_dim // num_heads
        else:
            num_features = check_size("codebook_dim", codebook_dim, 1)
        check_at_least("commitment_cost", commitment_cost, 0)
        check_choice("encodings", encodings, ("one_hot", "indices"))
        check_choice("metric", metric, ("euclidean", "cosine"))
        check_choice("gradient", gradient, GRADIENTS)
        check_index_dtype(index_dtype, num_embeddings)
        has_codebooks = num_heads > 1 and not shared_codebook
        super().__init__(
            num_embeddings,
            num_features,
            num_heads if has_codebooks else None,
            decay=decay,
            epsilon=epsilon,
            init=init,
            dead_code_threshold=dead_code_threshold,
            sync=sync,
            unit_length=metric == "cosine",
            names=names,
        )
        self._embedding_dim = embedding_dim
        self._commitment_cost = commitment_cost
        self._encodings = encodings
        self._channel_last = channel_last
        self._heads = num_heads
        self._shared_codebook = shared_codebook
        self._codebook_dim = codebook_dim
        self._metric = metric
        self._gradient: Gradient = gradient
        self._index_dtype = index_dtype
        width = num_features * num_heads
        self.project_in = nn.Linear(embedding_dim, width) if width != embedding_dim else None
        self.project_out = nn.Linear(width, embedding_dim) if width != embedding_dim else None

    @property
    def num_embeddings(self) -> int:
        """K, the number of codes."""
        return self._num_codes

    @property
    def embedding_dim(self) -> int:
        """The number of channels of the map."""
        return self._embedding_dim

    @property
    def commitment_cost(self) -> float:
        """The weight of the commitment loss."""
        return self._commitment_cost

    def reset_parameters(self) -> None:
        """Initialise codes, statistics and projections anew, as the constructor does; call it after `to_empty`."""
        super().reset_parameters()
        # The constructor calls this before there are projections.
        for name in ("project_in", "project_out"):
            if isinstance(projection := getattr(self, name, None), nn.Linear):
                projection.reset_parameters()

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> VectorQuantizerOutput:
        """Quantize a map.

        Args:
            inputs: [B, D, *spatial], or [B, *spatial, D] with channel_last, float16, bfloat16 or float32.
            mask: [B, *spatial] bool: True for a valid position. A masked position gets zeros and the index -1, and is
                in no loss and no statistics.
        Returns:
            loss: scalar float32.
            quantized: shape, dtype and (where they are dense, without a projection) strides of inputs.
            perplexity: scalar float32 in [1, K], of the codes that this batch is assigned to; with a codebook for each
                head their mean.
            encodings: one-hot vectors [B * positions, K] float32 (a vector for each head), or with encodings="indices"
                [B, *spatial] of `index_dtype`; with more than one head [B, *spatial, H].
        Raises:
            ValueError: rank, D, dtype or device do not fit, or the layer is exported in train mode while its codebook
                is uninitialised or ranks all-reduce; nothing has been changed.
        """
        if mask is not None and self._encodings == "indices":
            check_holds_no_code(self._index_dtype, "a mask")
        vectors, valid = self._as_vectors(inputs, mask)
        positions = valid
        of_heads = valid if valid is None or self._heads == 1 else valid[..., None].expand(vectors.shape[:-1])
        # Heads with a shared codebook are vectors like any other.
        valid = of_heads if self._num_heads is None else valid
        updates = self.begin(vectors.numel(), lambda: self.initial_codes(vectors, valid))
        out = vector_quantize(vectors, self._search_codebook(), mask=of_heads, gradient=self._gradient)
        if updates:
            self._update(vectors, out, valid)
        perplexity = perplexity_of(out.counts)
        return VectorQuantizerOutput(
            self._total_loss(out),
            self._as_map(out.quantized, inputs, positions),
            perplexity.mean() if perplexity.ndim else perplexity,
            self._encodings_of(out.indices, inputs),
        )

    def encode(self, inputs: Tensor) -> Tensor:
        """Indices of the nearest codes, [B, *spatial] or, with heads, [B, *spatial, H]; `inputs` as in `forward`."""
        vectors, _ = self._as_vectors(inputs, None)
        return self._index_map(nearest_code(vectors, self._search_codebook()), inputs)

    def decode(self, indices: Tensor) -> Tensor:
        """The map [B, D, *spatial] ([B, *spatial, D] with channel_last) of the codes at indices.

        The map has the dtype of the codebook; the index -1 gives zeros.

        Args:
            indices: [B, *spatial], or [B, *spatial, H] with more than one head, of an integer dtype.
        Raises:
            ValueError: no integers, the wrong rank, or (on the CPU) an index lies outside [-1, K).
        """
        indices = long_indices(indices)
        if indices.ndim == 0 or (self._heads > 1 and indices.shape[-1] != self._heads):
            expected = "[B, *spatial]" if self._heads == 1 else f"[B, *spatial, {self._heads}]"
            remedy = "; pass indices[None]" if indices.ndim == 0 else ""
            raise ValueError(f"expected indices of shape {expected}, got {tuple(indices.shape)}{remedy}")
        codes = gather_codes(self._search_codebook(), indices)
        if self._heads > 1:
            codes = codes.flatten(-2)
        if self.project_out is not None:
            is_code = indices >= 0
            codes = zeros_where_masked(
                project(self.project_out, codes), is_code.any(-1) if self._heads > 1 else is_code
            )
        return codes_to_map(codes, self._channel_last)

    def _total_loss(self, out: VectorQuantizeOutput) -> Tensor:
        """Combine the losses of the codebook and of the commitment into the loss that `forward` returns."""
        raise NotImplementedError

    def _update(self, vectors: Tensor, out: VectorQuantizeOutput, valid: Tensor | None) -> None:
        if self._decay is not None:
            statistics = ema_statistics(vectors, out.indices, self._num_codes, num_heads=self._num_heads)
        else:
            statistics = out.counts[..., None].to(self._sizes.dtype)
        self.update(statistics, lambda jitter: sample_vectors(vectors, jitter, self._sync, valid))

    def _search_codebook(self) -> Tensor:
        """The codebook that vectors are compared with: its codes, of length 1 for the cosine."""
        if self._metric == "cosine" and self._decay is None:
            # The backward of the lengths needs the codes as they were.
            return to_unit_length(self.codebook.clone() if self.writes_codes else self.codebook)
        return self.codebook

    def _as_vectors(self, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Check a map and its mask; the vectors [B, S, D] or [B, S, H, D], projected and normalised, and their mask."""
        vectors = map_to_vectors("inputs", inputs, "codebook", self.codebook, self._channel_last, self._embedding_dim)
        valid = mask_to_vectors(mask, inputs, self._channel_last)
        if self.project_in is not None or self._metric == "cosine":
            vectors = project(self.project_in, zeros_where_masked(vectors, valid))
        if self._heads > 1:
            vectors = vectors.unflatten(-1, (self._heads, self._num_features))
        return to_unit_length(vectors) if self._metric == "cosine" else vectors, valid

    def _as_map(self, quantized: Tensor, inputs: Tensor, valid: Tensor | None) -> Tensor:
        if self._heads > 1:
            quantized = quantized.flatten(-2)
        if self.project_out is not None:
            quantized = zeros_where_masked(project(self.project_out, quantized), valid)
        return vectors_to_map(quantized.to(inputs.dtype), inputs, self._channel_last)

    def _encodings_of(self, indices: Tensor, inputs: Tensor) -> Tensor:
        if self._encodings == "one_hot":
            return one_hot(indices.flatten(), self._num_codes)
        return self._index_map(indices, inputs)

    def _index_map(self, indices: Tensor, inputs: Tensor) -> Tensor:
        heads = () if self._heads == 1 else (self._heads,)
        shape = (*spatial_shape(inputs, self._channel_last), *heads)
        return indices.view(shape).to(self._index_dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())

    def _arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        averages = {} if self._decay is None else {"decay": self._decay, "epsilon": self._epsilon}
        return {
            "num_embeddings": self._num_codes,
            "embedding_dim": self._embedding_dim,
            "commitment_cost": self._commitment_cost,
            **averages,
            "encodings": self._encodings,
            "init": self._init,
            "dead_code_threshold": self._dead_code_threshold,
            "sync": self._sync,
            "channel_last": self._channel_last,
            "num_heads": self._heads,
            "shared_codebook": self._shared_codebook,
            "codebook_dim": self._codebook_dim,
            "metric": self._metric,
            "gradient": self._gradient,
            "index_dtype": self._index_dtype,
        }

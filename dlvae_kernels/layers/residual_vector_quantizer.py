from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional.checks import check_at_least, check_choice, check_size
from ..functional.residual_quantize import (
    GRADIENTS,
    ResidualGradient,
    residual_decode,
    residual_quantize,
)
from .codebook_state import Init, Threshold
from .level_codebook import LevelCodebook
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
from .projection import project, zeros_where_masked
from .usage import CodebookUsage, perplexity_of


class ResidualVectorQuantizerOutput(NamedTuple):
    """The result of a residual quantizer, whose `forward` describes the fields.

    >>> ResidualVectorQuantizerOutput._fields
    ('loss', 'quantized', 'perplexity', 'indices')
    """

    loss: Tensor
    quantized: Tensor
    perplexity: Tensor
    indices: Tensor


class ResidualVectorQuantizer(nn.Module):
    """Residual vector quantizer (RVQ): each level quantizes what the levels before it left of a vector.

    All levels run in one operation. In training each forward quantizes with the current codebooks, then updates them,
    by exponential moving averages (`decay` given) or by gradient (`decay` None):
    loss = sum over levels of commitment_cost * mean (sg[c_l] - r_l)^2, plus mean (c_l - sg[r_l])^2 without averages.

    Args:
        num_quantizers: L, the number of levels.
        num_embeddings: K, the number of codes of a level.
        embedding_dim: D, the channels of the map.
        commitment_cost: beta, >= 0.
        decay: weight of the past in the moving averages, in [0, 1]; None for codebooks that learn by gradient.
        epsilon: Laplace smoothing of the cluster sizes, >= 0.
        init: from the first training batch: "kmeans" of the residuals of each level, or "data" (random residuals);
            "normal", "uniform" in [-1/K, 1/K].
        dead_code_threshold: as in `VectorQuantizerEMA`; a revived code becomes a residual of the batch at its level.
        quantizer_dropout: in training, run a random number of levels, from `min_levels` to L, in each forward.
        min_levels: the fewest levels that quantizer dropout leaves.
        gradient: what passes from quantized to the inputs: "once" (straight-through), "each" (once for each level, as
            in vector-quantize-pytorch), "rotation" or "rotation_each"; see `residual_quantize`.
        codebook_dim: the features of a code, where linear layers project D to codebook_dim and back; None: D.
        sync: all-reduce statistics over the ranks of torch.distributed whenever it is initialised.
        channel_last: maps are [B, *spatial, D].
        index_dtype: of the indices: torch.int64, torch.int32, or (where every level runs) torch.uint16.
    Raises:
        ValueError: an argument is out of its range.

    state_dict: `codebook.codes` [L, K, D], `codebook.cluster_size` [L, K], `codebook.embed_sum` [L, K, D];
    `project_in.*` and `project_out.*` where there is a projection.

    >>> layer = ResidualVectorQuantizer(num_quantizers=4, num_embeddings=8, embedding_dim=6)
    >>> loss, quantized, perplexity, indices = layer(torch.randn(2, 6, 50))
    >>> quantized.shape, perplexity.shape, indices.shape
    (torch.Size([2, 6, 50]), torch.Size([4]), torch.Size([2, 50, 4]))
    >>> layer.decode(layer.encode(torch.randn(2, 6, 50), num_levels=2)).shape
    torch.Size([2, 6, 50])

    Source: Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1 and section III-C.
    """

    def __init__(
        self,
        num_quantizers: int,
        num_embeddings: int,
        embedding_dim: int,
        commitment_cost: float = 1.0,
        decay: float | None = 0.99,
        epsilon: float = 1e-5,
        *,
        init: Init = "kmeans",
        dead_code_threshold: Threshold = "auto",
        quantizer_dropout: bool = False,
        min_levels: int = 1,
        gradient: ResidualGradient = "once",
        codebook_dim: int | None = None,
        sync: bool = True,
        channel_last: bool = False,
        index_dtype: torch.dtype = torch.int64,
    ) -> None:
        super().__init__()
        self._num_quantizers = check_size("num_quantizers", num_quantizers, 1)
        self._num_embeddings = check_size("num_embeddings", num_embeddings, 1)
        self._embedding_dim = check_size("embedding_dim", embedding_dim, 1)
        self._min_levels = check_size("min_levels", min_levels, 1, self._num_quantizers)
        num_features = self._embedding_dim if codebook_dim is None else check_size("codebook_dim", codebook_dim, 1)
        check_at_least("commitment_cost", commitment_cost, 0)
        check_choice("gradient", gradient, GRADIENTS)
        check_index_dtype(index_dtype, self._num_embeddings)
        self._commitment_cost = commitment_cost
        if quantizer_dropout:
            check_holds_no_code(index_dtype, "quantizer dropout")
        self._quantizer_dropout = quantizer_dropout
        self._gradient: ResidualGradient = gradient
        self._codebook_dim = codebook_dim
        self._channel_last = channel_last
        self._index_dtype = index_dtype
        is_projected = num_features != self._embedding_dim
        self.project_in = nn.Linear(self._embedding_dim, num_features) if is_projected else None
        self.project_out = nn.Linear(num_features, self._embedding_dim) if is_projected else None
        self.codebook = LevelCodebook(
            self._num_embeddings,
            num_features,
            self._num_quantizers,
            decay=decay,
            epsilon=epsilon,
            init=init,
            dead_code_threshold=dead_code_threshold,
            sync=sync,
        )

    @property
    def codebooks(self) -> Tensor:
        """The codes of all levels, [L, K, D]."""
        return self.codebook.codebook

    @property
    def usage(self) -> CodebookUsage:
        """How evenly the codes of each level are used, [L]."""
        return self.codebook.usage

    def reset_parameters(self) -> None:
        """Initialise codes, statistics and projections anew, as the constructor does; call it after `to_empty`."""
        for module in (self.codebook, self.project_in, self.project_out):
            if module is not None:
                module.reset_parameters()

    @property
    def num_quantizers(self) -> int:
        """L, the number of levels."""
        return self._num_quantizers

    @property
    def num_embeddings(self) -> int:
        """K, the number of codes of a level."""
        return self._num_embeddings

    @property
    def embedding_dim(self) -> int:
        """The number of channels of the map."""
        return self._embedding_dim

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, *, num_levels: int | None = None
    ) -> ResidualVectorQuantizerOutput:
        """Quantize a map.

        Args:
            inputs: [B, D, *spatial], or [B, *spatial, D] with channel_last, float16, bfloat16 or float32.
            mask: [B, *spatial] bool: True for a valid position. A masked position gets zeros and indices of -1, and is
                in no loss and no statistics.
            num_levels: the number of levels that run, in [1, L]; None for all, or for quantizer dropout in training.
        Returns:
            loss: scalar float32, the sum over the levels.
            quantized: shape, dtype and (where they are dense, without a projection) strides of inputs.
            perplexity: [L] float32, of the codes that this batch is assigned to; 1 where a level did not run.
            indices: [B, *spatial, L] of `index_dtype`, -1 where a level did not run.
        Raises:
            ValueError: rank, D, dtype or device do not fit; nothing has been changed.
        """
        return self.quantize(inputs, mask, self.levels_to_run(num_levels))

    def levels_to_run(self, num_levels: int | None) -> int | Tensor | None:
        """The levels that run: their number, [L] bool with quantizer dropout (never read by the host), or None."""
        if num_levels is None and self.training and self._quantizer_dropout:
            device = self.codebooks.device
            count = torch.randint(self._min_levels, self._num_quantizers + 1, (), device=device)
            return torch.arange(self._num_quantizers, device=device) < count
        levels = self._check_levels(num_levels)
        return None if levels == self._num_quantizers else levels

    def quantize(
        self, inputs: Tensor, mask: Tensor | None, levels: int | Tensor | None
    ) -> ResidualVectorQuantizerOutput:
        """`forward` with the levels that `levels_to_run` has returned."""
        if mask is not None or levels is not None:
            check_holds_no_code(self._index_dtype, "a mask or without all levels")
        vectors, valid = self._as_vectors(inputs, mask)
        updates = self.codebook.begin(vectors.numel(), lambda: self.codebook.initial_codes(vectors, valid))
        # The update below changes the codebooks, which the backward needs as they were.
        codebooks = self.codebooks.clone() if updates and self.codebook.writes_codes else self.codebooks
        out = residual_quantize(vectors, codebooks, levels=levels, mask=valid, gradient=self._gradient)
        if updates:
            self.codebook.update_levels(vectors, out, codebooks, levels, valid)
        loss = self._commitment_cost * out.commitment_loss.sum()
        if not self.codebook.is_averaged:
            loss = loss + out.codebook_loss.sum()
        quantized = out.quantized
        if self.project_out is not None:
            quantized = zeros_where_masked(project(self.project_out, quantized), valid).to(inputs.dtype)
        return ResidualVectorQuantizerOutput(
            loss,
            vectors_to_map(quantized, inputs, self._channel_last),
            perplexity_of(out.counts),
            self._index_map(out.indices, inputs),
        )

    def encode(self, inputs: Tensor, *, num_levels: int | None = None) -> Tensor:
        """Indices of the first `num_levels` levels (None: all), [B, *spatial, num_levels]; `inputs` as in `forward`."""
        levels = self._check_levels(num_levels) or self._num_quantizers
        with torch.no_grad():
            indices = residual_quantize(self._as_vectors(inputs, None)[0], self.codebooks[:levels]).indices
        return self._index_map(indices, inputs)

    def decode(self, indices: Tensor) -> Tensor:
        """The map [B, D, *spatial] ([B, *spatial, D] with channel_last) of the codes at indices.

        The map has the dtype of the codebooks; the index -1 adds nothing.

        Args:
            indices: [B, *spatial, n] of an integer dtype, of the first n <= L levels.
        Raises:
            ValueError: no integers, the wrong shape, or (on the CPU) an index lies outside [-1, K).
        """
        indices = long_indices(indices)
        if indices.ndim < 2 or not 1 <= indices.shape[-1] <= self._num_quantizers:
            raise ValueError(
                f"expected indices of shape [B, *spatial, n] with n in [1, {self._num_quantizers}],"
                f" got {tuple(indices.shape)}"
            )
        codes = residual_decode(self.codebooks[: indices.shape[-1]], indices)
        if self.project_out is not None:
            codes = zeros_where_masked(project(self.project_out, codes), (indices >= 0).any(-1))
        return codes_to_map(codes, self._channel_last)

    def _check_levels(self, num_levels: int | None) -> int | None:
        return None if num_levels is None else check_size("num_levels", num_levels, 1, self._num_quantizers)

    def _as_vectors(self, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Check a map and its mask, and view them as projected vectors [B, S, D] and their mask."""
        vectors = map_to_vectors("inputs", inputs, "codebooks", self.codebooks, self._channel_last, self._embedding_dim)
        valid = mask_to_vectors(mask, inputs, self._channel_last)
        if self.project_in is not None:
            vectors = project(self.project_in, zeros_where_masked(vectors, valid))
        return vectors, valid

    def _index_map(self, indices: Tensor, inputs: Tensor) -> Tensor:
        shape = (*spatial_shape(inputs, self._channel_last), indices.shape[-1])
        return indices.view(shape).to(self._index_dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())

    def _arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {
            "num_quantizers": self._num_quantizers,
            "num_embeddings": self._num_embeddings,
            "embedding_dim": self._embedding_dim,
            "commitment_cost": self._commitment_cost,
            **self.codebook.arguments(),
            "quantizer_dropout": self._quantizer_dropout,
            "min_levels": self._min_levels,
            "gradient": self._gradient,
            "codebook_dim": self._codebook_dim,
            "channel_last": self._channel_last,
            "index_dtype": self._index_dtype,
        }

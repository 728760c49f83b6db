"""The codebooks of a residual quantizer, one a level."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.gather_codes import gather_codes
from ..functional.nearest_code import nearest_code
from ..functional.residual_quantize import ResidualQuantizeOutput, residual_statistics
from .codebook import Codebook
from .distributed import all_reduce_sum, sample_vectors


class LevelCodebook(Codebook):
    """The codebooks [L, K, D] of a residual quantizer, whose statistics are those of the residuals of each level."""

    def initial_codes(self, vectors: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Random residuals of the batch over all ranks, or their k-means, level by level: [L, K, D] and [L, K]."""
        residual = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
        levels = []
        for jitter in self._jitter(self._num_codes):
            sampled = all_reduce_sum(sample_vectors(residual, jitter, self._sync, mask), self._sync)
            codes, counts = self._codes_from(sampled, residual, mask)
            residual = residual - gather_codes(codes, nearest_code(residual, codes))
            levels.append((codes, counts))
        return torch.stack([codes for codes, _ in levels]), torch.stack([counts for _, counts in levels])

    @torch.no_grad()
    def update_levels(
        self,
        vectors: Tensor,
        out: ResidualQuantizeOutput,
        codebooks: Tensor,
        levels: int | Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Update the levels that ran by a training batch that `codebooks` quantized."""
        if self._decay is None:
            statistics = out.counts[..., None].to(self._sizes.dtype)
        else:
            statistics = residual_statistics(vectors, out.indices, codebooks)
        ran = torch.arange(len(codebooks), device=vectors.device) < levels if isinstance(levels, int) else levels
        self.update(
            statistics,
            lambda jitter: sample_residuals(vectors, out.indices, codebooks, jitter[0], self._sync, mask),
            ran,
        )


def sample_residuals(
    vectors: Tensor, indices: Tensor, codebooks: Tensor, jitter: Tensor, sync: bool, mask: Tensor | None
) -> Tensor:
    """The residuals of random vectors of the batch at every level, in the form of `sample_vectors`: [L, M, D + 1].

    All levels use the same vectors. A level that does not run has the residual of the level after it.

    Args:
        vectors, indices, codebooks: [..., D], [..., L] and [L, K, D].
        jitter, sync, mask: as in `sample_vectors`.
    """
    num_levels, _, num_features = codebooks.shape
    # The same jitter selects the same vectors and their indices; an index is exact in float32.
    sampled = sample_vectors(vectors, jitter, sync, mask)
    x, is_valid = sampled.split([num_features, 1], dim=1)
    index = sample_vectors(indices.to(x.dtype), jitter, sync, mask)[:, :-1]
    codes = gather_codes(codebooks, index.long())
    # Level l has lost the codes of the levels before it.
    lost = (codes.cumsum(1) - codes).to(x.dtype)
    residuals = (x[:, None] - lost).movedim(1, 0) * is_valid
    return torch.cat([residuals, is_valid.expand(num_levels, -1, -1)], dim=-1)

"""Squared distances as sums of squared differences in float32, whose relative error does not grow by cancellation."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import load_code_groups, load_rows


@triton.jit
def squared_distances(x, codes, n, k, scale, BLOCK_D: tl.constexpr):
    """The squared distances of vectors n [BLOCK_N] to codes k [BLOCK_N, GROUP], with differences times `scale`.

    `scale` is a scalar or [BLOCK_N, 1, 1]. The result for an index that is no code is without meaning.
    """
    total = tl.zeros(k.shape, tl.float32)
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        y = load_rows(x, n, d).to(tl.float32)
        difference = (y[:, None, :] - load_code_groups(codes, k, k < codes.num_codes, d).to(tl.float32)) * scale
        total += tl.sum(difference * difference, axis=2)
    return total

"""Squared distances by differences, as exact as float32 allows."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import code_offsets, load_rows


@triton.jit
def squared_distances(x, codes, n, index, scale, BLOCK_D: tl.constexpr):
    """Of rows n [BLOCK_N] to codes [BLOCK_N, G], by differences times `scale`; 0 where there is no such code.

    `scale` is a scalar, or [BLOCK_N, 1, 1].
    """
    total = tl.zeros(index.shape, tl.float32)
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        row = load_rows(x, n, d)
        offsets = code_offsets(codes, index)[:, :, None] + d.to(tl.int64)[None, None, :] * codes.stride_d
        inside = (index < codes.num_rows)[:, :, None] & (d < x.num_features)[None, None, :]
        c = tl.load(codes.tensor + offsets, mask=inside, other=0.0)
        difference = (row.to(tl.float32)[:, None, :] - c.to(tl.float32)) * scale
        total += tl.sum(difference * difference, axis=2)
    return total

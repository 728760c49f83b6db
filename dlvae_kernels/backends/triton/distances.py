"""Squared distances by differences, as exact as float32 allows."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import load_rows


@triton.jit
def squared_distances(
    x_ptr,
    codes_ptr,
    rows,
    codes,
    num_rows,
    num_codes,
    num_features,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    stride_ck,
    stride_cd,
    scale,
    UNIT: tl.constexpr,
    CODE_UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of rows [BLOCK_N] to codes [BLOCK_N, G], by differences times `scale`; 0 where there is no such code.

    `scale` is a scalar, or [BLOCK_N, 1, 1].
    """
    total = tl.zeros(codes.shape, tl.float32)
    for begin in range(0, num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x = load_rows(x_ptr, rows, d, num_rows, num_features, inner, stride_outer, stride_inner, stride_d, UNIT)
        starts = codes.to(tl.int64) * (stride_ck // CODE_UNIT) * CODE_UNIT
        offsets = starts[:, :, None] + d.to(tl.int64)[None, None, :] * stride_cd
        inside = (codes < num_codes)[:, :, None] & (d < num_features)[None, None, :]
        c = tl.load(codes_ptr + offsets, mask=inside, other=0.0)
        difference = (x.to(tl.float32)[:, None, :] - c.to(tl.float32)) * scale
        total += tl.sum(difference * difference, axis=2)
    return total

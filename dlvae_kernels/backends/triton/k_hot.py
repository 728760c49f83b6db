"""Dense coefficients of rows that keep k codes each, made tile by tile in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import on_device

# There are pairs for whole tiles of so many rows.
PADDED_ROWS = 64
_BLOCK_J = 32
UNROLL = tl.constexpr(4)


@triton.jit
def _pack_pairs_kernel(
    index_ptr,
    value_ptr,
    pair_ptr,
    num_rows,
    num_codes,
    kept,
    padded,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    j = (tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J))[None, :]
    mask = (n < num_rows) & (j < kept)
    index = tl.load(index_ptr + n * kept + j, mask=mask, other=-1)
    value = tl.load(value_ptr + n * kept + j, mask=mask, other=0.0).to(tl.float32)
    # No column is -1.
    index = tl.where((index >= 0) & (index < num_codes), index, -1)
    pair = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (index & 0xFFFFFFFF)
    tl.store(pair_ptr + j.to(tl.int64) * padded + n, pair, mask=j < kept)


def pack_pairs(indices: Tensor, values: Tensor, num_codes: int) -> Tensor:
    """[k, N rounded up to tiles] int64 of a value's bits and an index [..., k]: one load reads both, of many rows."""
    kept = indices.shape[-1]
    num_rows = indices.numel() // kept
    blocks = triton.cdiv(num_rows, PADDED_ROWS)
    pairs = torch.empty(kept, blocks * PADDED_ROWS, dtype=torch.int64, device=indices.device)
    with on_device(indices):
        _pack_pairs_kernel[(blocks, triton.cdiv(kept, _BLOCK_J))](
            indices.contiguous(),
            values.contiguous(),
            pairs,
            num_rows,
            num_codes,
            kept,
            blocks * PADDED_ROWS,
            BLOCK_N=PADDED_ROWS,
            BLOCK_J=_BLOCK_J,
        )
    return pairs


@triton.jit
def k_hot(pair_ptr, n, codes, kept, padded):  # [BLOCK_K, BLOCK_N] float32
    """Coefficients of rows n for these codes; of a code that a row keeps twice the values add up."""
    coefficient = tl.zeros([codes.shape[0], n.shape[0]], tl.float32)
    at = pair_ptr + n
    for _ in tl.range(0, kept, loop_unroll_factor=UNROLL):
        # Rows lie along the threads of a warp, so that a thread reads one pair for all of its codes.
        pair = tl.load(at)
        value = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        is_kept = codes[:, None] == pair.to(tl.int32)[None, :]
        coefficient = tl.where(is_kept, coefficient + value[None, :], coefficient)
        at += padded
    return coefficient

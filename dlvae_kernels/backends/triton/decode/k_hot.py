"""Dense coefficients of vectors that select k codes each, made tile by tile in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import on_device

# Vectors in a tile; the pairs are padded to whole tiles.
PADDED_ROWS = 64
_BLOCK_J = 32
_UNROLL = tl.constexpr(4)


@triton.jit
def _pack_pairs_kernel(
    index_ptr,
    value_ptr,
    pair_ptr,
    num_vectors,
    num_codes,
    num_selected,
    padded,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Write the pairs of a value and an index, and the index -1 in place of one out of range."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    j = (tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J))[None, :]
    mask = (n < num_vectors) & (j < num_selected)
    index = tl.load(index_ptr + n * num_selected + j, mask=mask, other=-1)
    value = tl.load(value_ptr + n * num_selected + j, mask=mask, other=0.0).to(tl.float32)
    index = tl.where((index >= 0) & (index < num_codes), index, -1)
    pair = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (index & 0xFFFFFFFF)
    tl.store(pair_ptr + j.to(tl.int64) * padded + n, pair, mask=j < num_selected)


def pack_pairs(indices: Tensor, values: Tensor, num_codes: int) -> Tensor:
    """[k, N rounded up to tiles] int64: the bits of a float32 value above an int32 index, so that one load reads both.

    Args:
        indices, values: [..., k].
    """
    num_selected = indices.shape[-1]
    num_vectors = indices.numel() // num_selected
    blocks = triton.cdiv(num_vectors, PADDED_ROWS)
    pairs = torch.empty(num_selected, blocks * PADDED_ROWS, dtype=torch.int64, device=indices.device)
    with on_device(indices):
        _pack_pairs_kernel[(blocks, triton.cdiv(num_selected, _BLOCK_J))](
            indices.contiguous(),
            values.contiguous(),
            pairs,
            num_vectors,
            num_codes,
            num_selected,
            blocks * PADDED_ROWS,
            BLOCK_N=PADDED_ROWS,
            BLOCK_J=_BLOCK_J,
        )
    return pairs


@triton.jit
def k_hot(pair_ptr, n, k, num_selected, padded):
    """The coefficients of vectors n for codes k, [BLOCK_K, BLOCK_N] float32; the values of a repeated code add up."""
    coefficient = tl.zeros([k.shape[0], n.shape[0]], tl.float32)
    at = pair_ptr + n
    for _ in tl.range(0, num_selected, loop_unroll_factor=_UNROLL):
        # Vectors lie along the threads of a warp: a thread loads one pair for all of its codes.
        pair = tl.load(at)
        value = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        is_selected = k[:, None] == pair.to(tl.int32)[None, :]
        coefficient = tl.where(is_selected, coefficient + value[None, :], coefficient)
        at += padded
    return coefficient

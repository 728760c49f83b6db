"""Triton `one_hot`: one pass that writes each element once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architectures import on_device

_BLOCK_N, _BLOCK_K = 16, 256


@triton.jit
def _one_hot_kernel(
    index_ptr, out_ptr, num_vectors, num_codes, num_selected, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Write ones at the indices [N, k] of each vector, and zeros elsewhere: [N, K]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = n < num_vectors
    is_hot = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    for place in range(0, num_selected):
        index = tl.load(index_ptr + n.to(tl.int64) * num_selected + place, mask=mask, other=-1)
        is_hot = tl.where(index[:, None] == k[None, :], 1, is_hot)
    offsets = n.to(tl.int64)[:, None] * num_codes + k[None, :]
    value = is_hot.to(tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, value, mask=mask[:, None] & (k < num_codes)[None, :])


def one_hot(indices: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
    num_vectors, num_selected = len(indices), indices.shape[1] if indices.ndim == 2 else 1
    out = torch.empty(num_vectors, num_codes, dtype=dtype, device=indices.device)
    if out.numel() > 0:
        grid = (triton.cdiv(num_vectors, _BLOCK_N), triton.cdiv(num_codes, _BLOCK_K))
        with on_device(indices):
            _one_hot_kernel[grid](
                indices.contiguous(), out, num_vectors, num_codes, num_selected, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K
            )
    return out

"""Triton `one_hot`: one pass that writes every element, zeros and ones alike."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import on_device


@triton.jit
def _one_hot_kernel(index_ptr, out_ptr, num_rows, num_codes, kept, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = rows < num_rows
    is_hot = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    for place in range(0, kept):
        index = tl.load(index_ptr + rows.to(tl.int64) * kept + place, mask=mask, other=-1)
        is_hot = tl.where(index[:, None] == columns[None, :], 1, is_hot)
    offsets = rows.to(tl.int64)[:, None] * num_codes + columns[None, :]
    value = is_hot.to(tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, value, mask=mask[:, None] & (columns < num_codes)[None, :])


def one_hot(indices: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(indices), num_codes, dtype=dtype, device=indices.device)
    kept = indices.shape[1] if indices.ndim == 2 else 1
    grid = (triton.cdiv(len(indices), 16), triton.cdiv(num_codes, 256))
    if out.numel() > 0:
        with on_device(indices):
            _one_hot_kernel[grid](indices.contiguous(), out, len(indices), num_codes, kept, BLOCK_N=16, BLOCK_K=256)
    return out

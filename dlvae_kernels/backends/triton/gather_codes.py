"""Triton `gather_codes`: rows of the codebook; their gradients are summed by code in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import as_rows, unit
from .segment_sum import segment_sum, valid_or_last
from .tuning import on_device

_BLOCK_N = 64


@triton.jit
def _gather_codes_fwd_kernel(
    codes_ptr,
    index_ptr,
    out_ptr,
    num_rows,
    num_codes,
    num_features,
    stride_k,
    stride_d,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (d < num_features)[None, :]
    index = tl.load(index_ptr + rows, mask=rows < num_rows, other=0)
    # An index out of range reads nothing, and gives 0.
    is_valid = (index >= 0) & (index < num_codes)
    offsets = (index * (stride_k // UNIT) * UNIT)[:, None] + d.to(tl.int64)[None, :] * stride_d
    code = tl.load(codes_ptr + offsets, mask=mask & is_valid[:, None], other=0.0)
    out = rows.to(tl.int64) * (num_features // UNIT) * UNIT
    tl.store(out_ptr + out[:, None] + d[None, :], code, mask=mask)


def gather_codes_fwd(codebook: Tensor, indices: Tensor) -> Tensor:
    num_codes, num_features = codebook.shape
    out = torch.empty(*indices.shape, num_features, dtype=codebook.dtype, device=codebook.device)
    if out.numel() > 0:
        grid = (triton.cdiv(indices.numel(), _BLOCK_N), triton.cdiv(num_features, 64))
        sizes = (indices.numel(), num_codes, num_features, *codebook.stride())
        with on_device(codebook):
            _gather_codes_fwd_kernel[grid](
                codebook,
                indices.contiguous(),
                out,
                *sizes,
                UNIT=unit(codebook.stride(0), num_features),
                BLOCK_N=_BLOCK_N,
                BLOCK_D=64,
            )
    return out


def gather_codes_bwd(grad: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    return segment_sum(as_rows(grad), valid_or_last(indices, num_codes), num_codes)[:, :-1].contiguous()

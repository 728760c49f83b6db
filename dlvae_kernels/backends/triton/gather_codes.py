"""Triton `gather_codes`: rows of the codebook; their gradients are summed by code in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import as_rows, load_codes, store_rows
from .segment_sum import segment_sum, valid_or_last
from .tuning import on_device

_BLOCK_N = 64


@triton.jit
def _gather_codes_fwd_kernel(codes, index_ptr, out, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """An index out of range reads nothing, and gives 0."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    index = tl.load(index_ptr + n, mask=n < out.num_rows, other=-1)
    store_rows(out, load_codes(codes, index, d), n, d)


def gather_codes_fwd(codebook: Tensor, indices: Tensor) -> Tensor:
    out = torch.empty(*indices.shape, codebook.shape[1], dtype=codebook.dtype, device=codebook.device)
    if out.numel() > 0:
        grid = (triton.cdiv(indices.numel(), _BLOCK_N), triton.cdiv(codebook.shape[1], 64))
        with on_device(codebook):
            _gather_codes_fwd_kernel[grid](
                as_rows(codebook), indices.contiguous(), as_rows(out), BLOCK_N=_BLOCK_N, BLOCK_D=64
            )
    return out


def gather_codes_bwd(grad: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    return segment_sum(as_rows(grad), valid_or_last(indices, num_codes), num_codes)[:, :-1].contiguous()

"""Assignments as the sums take them: codes numbered over all heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import on_device

_BLOCK_N = 1024


@triton.jit
def flat_code(index, n, num_codes, num_heads):
    """The codes of vectors n, (n % H) * K + index; H * K (no code) where the index is not in [0, K)."""
    is_valid = (index >= 0) & (index < num_codes)
    return tl.where(is_valid, (n % num_heads) * num_codes + index, num_heads * num_codes)


@triton.jit
def _flat_codes_kernel(index_ptr, code_ptr, num_vectors, num_codes, num_heads, BLOCK_N: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.load(index_ptr + n, mask=n < num_vectors, other=-1)
    code = flat_code(index, n, num_codes, num_heads)
    tl.store(code_ptr + n, code.to(code_ptr.dtype.element_ty), mask=n < num_vectors)


def code_dtype(num_codes: int) -> torch.dtype:
    """The smallest dtype that holds every code, and K (no code): fewer bits are sorted faster."""
    return next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if num_codes <= torch.iinfo(dtype).max)


def flat_codes(indices: Tensor, num_codes: int, num_heads: int = 1) -> Tensor:
    """The codes [N] that `flat_code` gives for the indices of N vectors."""
    codes = torch.empty(indices.numel(), dtype=code_dtype(num_heads * num_codes), device=indices.device)
    if codes.numel() > 0:
        grid = (triton.cdiv(codes.numel(), _BLOCK_N),)
        with on_device(indices):
            _flat_codes_kernel[grid](indices.contiguous(), codes, len(codes), num_codes, num_heads, BLOCK_N=_BLOCK_N)
    return codes

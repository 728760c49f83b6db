"""Triton `gather_codes`: copies of codes; their gradients are summed by code in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architectures import on_device
from .language.rows import as_codes, as_rows, codes_of_head, head_of_program, load_codes, store_rows, vectors_of_head
from .sums.flat_codes import flat_codes
from .sums.segment_sum import segment_sum

_BLOCK_N, _BLOCK_D = 64, 64


@triton.jit
def _gather_codes_fwd_kernel(codes, index_ptr, out, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the codes at the indices; an index out of range reads nothing and gives 0."""
    head = head_of_program(codes)
    n = vectors_of_head(codes, head, tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.load(index_ptr + n, mask=n < out.num_vectors, other=-1)
    store_rows(out, load_codes(codes_of_head(codes, head), k, d), n, d)


def gather_codes_fwd(codebook: Tensor, indices: Tensor) -> Tensor:
    codes, num_features = as_codes(codebook), codebook.shape[-1]
    out = torch.empty(*indices.shape, num_features, dtype=codebook.dtype, device=codebook.device)
    if out.numel() > 0:
        heads = codes.heads
        grid = (triton.cdiv(indices.numel() // heads, _BLOCK_N), triton.cdiv(num_features, _BLOCK_D), heads)
        with on_device(codebook):
            _gather_codes_fwd_kernel[grid](
                codes, indices.contiguous(), as_rows(out), BLOCK_N=_BLOCK_N, BLOCK_D=_BLOCK_D
            )
    return out


def gather_codes_bwd(grad: Tensor, indices: Tensor, num_codes: int, num_heads: int) -> Tensor:
    codes = flat_codes(indices, num_codes, num_heads)
    return segment_sum(as_rows(grad, num_heads), codes, num_heads * num_codes)[:, :-1].contiguous()

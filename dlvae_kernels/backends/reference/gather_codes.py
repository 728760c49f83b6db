"""Reference of `gather_codes`: codes of the codebook, and the sums of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .segment_sum import segment_sum


def gather_codes_fwd(codebook: Tensor, indices: Tensor) -> Tensor:
    return codebook.index_select(0, indices.flatten()).view(*indices.shape, codebook.shape[1])


def gather_codes_bwd(grad: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    vectors = grad.reshape(-1, grad.shape[-1]).to(torch.promote_types(grad.dtype, torch.float32))  # [N, D]
    return segment_sum(vectors, None, indices.flatten(), num_codes, None)

"""Reference of `gather_codes`: codes of the codebook, zeros for the index -1, and the sums of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import codes_of_heads
from .segment_sum import segment_sum


def gather_codes_fwd(codebook: Tensor, indices: Tensor) -> Tensor:
    num_heads = len(codebook) if codebook.ndim == 3 else 1
    num_codes, num_features = codebook.shape[-2:]
    codes = codes_of_heads(indices, num_codes, num_heads)
    gathered = codebook.reshape(-1, num_features).index_select(0, codes.clamp(min=0))
    return gathered.masked_fill_(codes[:, None] < 0, 0).view(*indices.shape, num_features)


def gather_codes_bwd(grad: Tensor, indices: Tensor, num_codes: int, num_heads: int) -> Tensor:
    vectors = grad.reshape(-1, grad.shape[-1]).to(torch.promote_types(grad.dtype, torch.float32))  # [N, D]
    codes = codes_of_heads(indices, num_codes, num_heads)
    return segment_sum(vectors, None, codes, num_heads * num_codes, None)

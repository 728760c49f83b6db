"""Reference of `sparse_decode`: each row is a weighted sum of k atoms; and the gradients of that sum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .segment_sum import segment_sum

# Elements of one temporary chunk in the gradient of the values.
_CHUNK_ELEMENTS = 2**21
# Above this K / k a chunk gathers its atoms; below, one product with the whole dictionary is cheaper.
_GATHER_ABOVE = 64


def sparse_decode_fwd(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    dtype = torch.promote_types(dictionary.dtype, torch.float32)
    k = indices.shape[-1]
    out = embedding_bag(
        indices.reshape(-1, k), dictionary.to(dtype), mode="sum", per_sample_weights=values.reshape(-1, k).to(dtype)
    )
    return out.view(*indices.shape[:-1], dictionary.shape[1]).to(torch.promote_types(values.dtype, dictionary.dtype))


def sparse_decode_bwd(
    grad: Tensor, values: Tensor, indices: Tensor, dictionary: Tensor, need_values: bool, need_dictionary: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(dictionary.dtype, torch.float32)
    k = indices.shape[-1]
    rows = grad.reshape(-1, grad.shape[-1]).to(dtype)  # [N, D]
    per_row = indices.reshape(-1, k)  # [N, k]
    grad_values, grad_dictionary = (torch.empty(0, dtype=dtype, device=grad.device) for _ in range(2))
    if need_values:
        grad_values = _atom_products(rows, per_row, dictionary.to(dtype)).view(values.shape)
    if need_dictionary:
        row_of = torch.arange(len(rows), device=grad.device).repeat_interleave(k)  # [N * k]
        weights = values.flatten().to(dtype)
        grad_dictionary = segment_sum(rows, row_of, per_row.flatten(), len(dictionary), weights)
    return grad_values, grad_dictionary


def _atom_products(rows: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    """Inner product of each row [N, D] with its atoms: [N, k]."""
    products = torch.empty(indices.shape, dtype=rows.dtype, device=rows.device)
    num_atoms, k = len(dictionary), indices.shape[1]
    gathers = num_atoms > _GATHER_ABOVE * k
    chunk = max(1, _CHUNK_ELEMENTS // max(1, k * rows.shape[1] if gathers else num_atoms))
    # Autocast would round a matrix product to half precision.
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            if gathers:
                products[part] = (rows[part, None] * dictionary[indices[part]]).sum(2)
            else:
                products[part] = (rows[part] @ dictionary.T).gather(1, indices[part])
    return products

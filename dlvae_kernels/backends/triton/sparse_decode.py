"""Triton `sparse_decode`: rows read the atoms that they kept, no dense coefficients; gradients without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Rows, as_rows, row_offsets, unit
from .segment_sum import segment_sum
from .tuning import on_device

# Kept atoms that are in flight at once.
_UNROLL = 8


@triton.jit
def _load_atoms(
    dictionary_ptr, atoms, d, num_atoms, num_features, stride_k, stride_d, UNIT: tl.constexpr
):  # [UNROLL, BLOCK_D] float32
    """Atoms and features of a dictionary; 0 for an atom that is not there."""
    offsets = (atoms * (stride_k // UNIT) * UNIT)[:, None] + d.to(tl.int64)[None, :] * stride_d
    inside = ((atoms >= 0) & (atoms < num_atoms))[:, None] & (d < num_features)[None, :]
    return tl.load(dictionary_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sparse_decode_fwd_kernel(
    value_ptr,
    index_ptr,
    dictionary_ptr,
    out_ptr,
    num_atoms,
    num_features,
    kept,
    stride_k,
    stride_d,
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of features of one row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, kept, UNROLL):
        j = begin + tl.arange(0, UNROLL)
        atoms = tl.load(index_ptr + row * kept + j, mask=j < kept, other=-1)
        values = tl.load(value_ptr + row * kept + j, mask=j < kept, other=0.0).to(tl.float32)
        found = _load_atoms(dictionary_ptr, atoms, d, num_atoms, num_features, stride_k, stride_d, UNIT)
        total += tl.sum(values[:, None] * found, axis=0)
    tl.store(out_ptr + row * num_features + d, total.to(out_ptr.dtype.element_ty), mask=d < num_features)


@triton.jit
def _sparse_decode_bwd_values_kernel(
    grad_ptr,
    index_ptr,
    dictionary_ptr,
    out_ptr,
    num_atoms,
    num_features,
    kept,
    inner,
    stride_outer,
    stride_inner,
    stride_gd,
    stride_k,
    stride_d,
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Inner products of the gradient of one row with some of its atoms."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * UNROLL + tl.arange(0, UNROLL)
    atoms = tl.load(index_ptr + row * kept + j, mask=j < kept, other=-1)
    start = row_offsets(row, inner, stride_outer, stride_inner)
    total = tl.zeros([UNROLL], tl.float32)
    for begin in range(0, num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        grad = tl.load(grad_ptr + start + d.to(tl.int64) * stride_gd, mask=d < num_features, other=0.0).to(tl.float32)
        found = _load_atoms(dictionary_ptr, atoms, d, num_atoms, num_features, stride_k, stride_d, UNIT)
        total += tl.sum(found * grad[None, :], axis=1)
    tl.store(out_ptr + row * kept + j, total, mask=j < kept)


def _block_d(num_features: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(num_features)))


def sparse_decode_fwd(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    num_atoms, num_features = dictionary.shape
    kept = indices.shape[-1]
    dtype = torch.promote_types(values.dtype, dictionary.dtype)
    out = torch.empty(*indices.shape[:-1], num_features, dtype=dtype, device=dictionary.device)
    if out.numel() > 0:
        block = _block_d(num_features, 256)
        with on_device(out):
            _sparse_decode_fwd_kernel[(indices.numel() // kept, triton.cdiv(num_features, block))](
                values.contiguous(),
                indices.contiguous(),
                dictionary,
                out,
                num_atoms,
                num_features,
                kept,
                *dictionary.stride(),
                UNIT=unit(dictionary.stride(0)),
                UNROLL=_UNROLL,
                BLOCK_D=block,
            )
    return out


def sparse_decode_bwd(
    grad: Tensor, values: Tensor, indices: Tensor, dictionary: Tensor, need_values: bool, need_dictionary: bool
) -> tuple[Tensor, Tensor]:
    grad_values, grad_dictionary = (torch.empty(0, dtype=torch.float32, device=grad.device) for _ in range(2))
    rows = as_rows(grad)
    if need_values:
        grad_values = _bwd_values(rows, indices, dictionary)
    if need_dictionary:
        atoms = indices.flatten()
        atoms = torch.where((atoms >= 0) & (atoms < len(dictionary)), atoms, len(dictionary))
        total = segment_sum(rows, atoms, len(dictionary), values.contiguous())
        grad_dictionary = total[:, :-1].contiguous()
    return grad_values, grad_dictionary


def _bwd_values(rows: Rows, indices: Tensor, dictionary: Tensor) -> Tensor:
    num_atoms, num_features = dictionary.shape
    kept = indices.shape[-1]
    out = torch.empty(indices.shape, dtype=torch.float32, device=dictionary.device)
    if out.numel() > 0:
        with on_device(out):
            _sparse_decode_bwd_values_kernel[(rows.num_rows, triton.cdiv(kept, _UNROLL))](
                rows.tensor,
                indices.contiguous(),
                dictionary,
                out,
                num_atoms,
                num_features,
                kept,
                *rows.strides,
                *dictionary.stride(),
                UNIT=unit(dictionary.stride(0)),
                UNROLL=_UNROLL,
                BLOCK_D=_block_d(num_features, 256),
            )
    return out

"""Triton `sparse_decode`: rows read the atoms that they kept, no dense coefficients; gradients without atomics.

Where atoms are few, dense coefficients that never leave the chip are faster: see `dense_decode`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense_decode import dense_decode_bwd_dictionary, dense_decode_bwd_values, dense_decode_fwd, suits
from .rows import Rows, as_rows, load_codes, load_rows, store_rows
from .segment_sum import segment_sum, valid_or_last
from .tuning import on_device

# Elements of one block of rows and features, and blocks that are in flight at once.
_BLOCK, _UNROLL = 2048, 4
# The most atoms that are added in float32, one after another: the error of such a chain grows with its length.
_CHAIN = 128


@triton.jit
def _atoms_sum(value_ptr, index_ptr, dictionary, n, d, begin, end, num_rows, kept, UNROLL: tl.constexpr):
    """Features d of the weighted sum of atoms [begin, end) of rows n."""
    total = tl.zeros([n.shape[0], d.shape[0]], tl.float32)
    for first in range(begin, end, UNROLL):
        for step in tl.static_range(UNROLL):
            j = first + step
            mask = (n < num_rows) & (j < end)
            atoms = tl.load(index_ptr + n * kept + j, mask=mask, other=-1)
            values = tl.load(value_ptr + n * kept + j, mask=mask, other=0.0).to(tl.float32)
            found = load_codes(dictionary, atoms, d)
            total += values[:, None] * found.to(tl.float32)
    return total


@triton.jit
def _sparse_decode_fwd_kernel(
    value_ptr,
    index_ptr,
    dictionary,
    out,
    kept,
    UNROLL: tl.constexpr,
    CHAIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of features of a block of rows: these features of all atoms stay in the L2 cache.

    CHAIN: how many atoms are added one after another, before their sum is added in float64; None for all.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if CHAIN is None:
        total = _atoms_sum(value_ptr, index_ptr, dictionary, n, d, 0, kept, out.num_rows, kept, UNROLL)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
        for begin in range(0, kept, CHAIN):
            end = tl.minimum(begin + CHAIN, kept)
            chain = _atoms_sum(value_ptr, index_ptr, dictionary, n, d, begin, end, out.num_rows, kept, UNROLL)
            total += chain.to(tl.float64)
        total = total.to(tl.float32)
    store_rows(out, total, n, d)


@triton.jit
def _sparse_decode_bwd_values_kernel(
    grad, index_ptr, dictionary, out_ptr, kept, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Inner products of gradients with atoms, for a block of pairs of a row and an atom."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = pair < tl.cast(grad.num_rows, tl.int64) * kept
    atoms = tl.load(index_ptr + pair, mask=mask, other=-1)
    n = pair // kept
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for begin in range(0, grad.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        total += load_rows(grad, n, d).to(tl.float32) * load_codes(dictionary, atoms, d).to(tl.float32)
    # An atom that is not there has product 0, whatever the gradient.
    is_there = (atoms >= 0) & (atoms < dictionary.num_rows)
    tl.store(out_ptr + pair, tl.where(is_there, tl.sum(total, axis=1), 0.0), mask=mask)


def _block_d(num_features: int) -> int:
    return min(256, max(16, triton.next_power_of_2(num_features)))


def sparse_decode_fwd(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    num_atoms, num_features = dictionary.shape
    kept = indices.shape[-1]
    num_rows = indices.numel() // kept
    dtype = torch.promote_types(values.dtype, dictionary.dtype)
    out = torch.empty(*indices.shape[:-1], num_features, dtype=dtype, device=dictionary.device)
    if out.numel() == 0:
        return out
    if suits(num_rows, num_atoms, num_features, kept, dtype):
        dense_decode_fwd(values, indices, dictionary, out)
        return out
    block = _block_d(num_features)
    is_chain = kept <= _CHAIN
    # The float64 total takes the registers of half a block.
    block_n = (_BLOCK if is_chain else _BLOCK // 2) // block
    with on_device(out):
        _sparse_decode_fwd_kernel[(triton.cdiv(num_rows, block_n), triton.cdiv(num_features, block))](
            values.contiguous(),
            indices.contiguous(),
            as_rows(dictionary),
            as_rows(out),
            kept,
            UNROLL=min(_UNROLL, triton.next_power_of_2(kept)),
            CHAIN=None if is_chain else _CHAIN,
            BLOCK_N=block_n,
            BLOCK_D=block,
        )
    return out


def sparse_decode_bwd(
    grad: Tensor, values: Tensor, indices: Tensor, dictionary: Tensor, need_values: bool, need_dictionary: bool
) -> tuple[Tensor, Tensor]:
    grad_values, grad_dictionary = (torch.empty(0, dtype=torch.float32, device=grad.device) for _ in range(2))
    num_atoms, num_features = dictionary.shape
    rows = as_rows(grad)
    is_dense = grad.numel() > 0 and suits(rows.num_rows, num_atoms, num_features, indices.shape[-1], grad.dtype)
    if need_values:
        grad_values = torch.empty(indices.shape, dtype=torch.float32, device=grad.device)
        if grad.numel() > 0:
            (dense_decode_bwd_values if is_dense else _bwd_values)(rows, indices, dictionary, grad_values)
    if need_dictionary and is_dense:
        grad_dictionary = dense_decode_bwd_dictionary(rows, values, indices, num_atoms)
    elif need_dictionary:
        atoms = valid_or_last(indices, num_atoms)
        grad_dictionary = segment_sum(rows, atoms, num_atoms, values.contiguous())[:, :-1].contiguous()
    return grad_values, grad_dictionary


def _bwd_values(rows: Rows, indices: Tensor, dictionary: Tensor, out: Tensor) -> None:
    block = _block_d(dictionary.shape[1])
    with on_device(out):
        _sparse_decode_bwd_values_kernel[(triton.cdiv(indices.numel(), _BLOCK // block),)](
            rows,
            indices.contiguous(),
            as_rows(dictionary),
            out,
            indices.shape[-1],
            BLOCK_P=_BLOCK // block,
            BLOCK_D=block,
        )

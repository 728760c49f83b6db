"""Triton `sparse_decode`: each vector reads the k atoms that it selected; the gradients need no atomics.

With few atoms, dense coefficients that never leave the chip are faster: see `decode/dense_decode.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architectures import architecture, on_device
from .decode.dense_decode import dense_decode_bwd_dictionary, dense_decode_bwd_values, dense_decode_fwd, suits
from .language.rows import Rows, as_codes, as_rows, load_codes, load_rows, store_rows
from .sums.flat_codes import flat_codes
from .sums.segment_sum import segment_sum

# Elements of one block of vectors and features, and atoms that are loaded at once.
_BLOCK, _UNROLL = 2048, 4
# The most atoms that are added in float32 one after another (docs/numerics.md, section 9.1).
_CHAIN = 128


@triton.jit
def _atoms_sum(value_ptr, index_ptr, dictionary, n, d, begin, end, num_vectors, num_selected, UNROLL: tl.constexpr):
    """Features d of the weighted sum of the selected atoms [begin, end) of vectors n, [BLOCK_N, BLOCK_D] float32."""
    total = tl.zeros([n.shape[0], d.shape[0]], tl.float32)
    for first in range(begin, end, UNROLL):
        for step in tl.static_range(UNROLL):
            j = first + step
            mask = (n < num_vectors) & (j < end)
            at = n * num_selected + j
            atoms = tl.load(index_ptr + at, mask=mask, other=-1)
            values = tl.load(value_ptr + at, mask=mask, other=0.0).to(tl.float32)
            total += values[:, None] * load_codes(dictionary, atoms, d).to(tl.float32)
    return total


@triton.jit
def _sparse_decode_fwd_kernel(
    value_ptr,
    index_ptr,
    dictionary,
    out,
    num_selected,
    UNROLL: tl.constexpr,
    CHAIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a block of features of a block of vectors. These features of all atoms stay in the L2 cache.

    CHAIN: the number of atoms that are added in float32 before their sum is added in float64; None for all.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sizes = out.num_vectors, num_selected
    if CHAIN is None:
        total = _atoms_sum(value_ptr, index_ptr, dictionary, n, d, 0, num_selected, *sizes, UNROLL)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
        for begin in range(0, num_selected, CHAIN):
            end = tl.minimum(begin + CHAIN, num_selected)
            chain = _atoms_sum(value_ptr, index_ptr, dictionary, n, d, begin, end, *sizes, UNROLL)
            total += chain.to(tl.float64)
        total = total.to(tl.float32)
    store_rows(out, total, n, d)


@triton.jit
def _sparse_decode_bwd_values_kernel(
    grad, index_ptr, dictionary, out_ptr, num_selected, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write the inner products of gradients with atoms, for a block of pairs of a vector and an atom."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = pair < tl.cast(grad.num_vectors, tl.int64) * num_selected
    atoms = tl.load(index_ptr + pair, mask=mask, other=-1)
    n = pair // num_selected
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for begin in range(0, grad.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        total += load_rows(grad, n, d).to(tl.float32) * load_codes(dictionary, atoms, d).to(tl.float32)
    # The product with an atom out of range is 0, also if the gradient is not finite.
    is_atom = (atoms >= 0) & (atoms < dictionary.num_codes)
    tl.store(out_ptr + pair, tl.where(is_atom, tl.sum(total, axis=1), 0.0), mask=mask)


def _block_d(num_features: int) -> int:
    return min(256, max(16, triton.next_power_of_2(num_features)))


def sparse_decode_fwd(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    num_codes, num_features = dictionary.shape
    num_selected = indices.shape[-1]
    num_vectors = indices.numel() // num_selected
    dtype = torch.promote_types(values.dtype, dictionary.dtype)
    out = torch.empty(*indices.shape[:-1], num_features, dtype=dtype, device=dictionary.device)
    if out.numel() == 0:
        return out
    if suits(num_vectors, num_codes, num_features, num_selected, dtype):
        dense_decode_fwd(values, indices, dictionary, out)
        return out
    block_d = _block_d(num_features)
    is_chain = num_selected <= _CHAIN
    # A float64 total takes the registers of two blocks.
    block_n = (_BLOCK if is_chain else _BLOCK // 2) // block_d
    with on_device(out):
        _sparse_decode_fwd_kernel[(triton.cdiv(num_vectors, block_n), triton.cdiv(num_features, block_d))](
            values.contiguous(),
            indices.contiguous(),
            as_codes(dictionary),
            as_rows(out),
            num_selected,
            UNROLL=min(_UNROLL, triton.next_power_of_2(num_selected)),
            CHAIN=None if is_chain else _CHAIN,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            maxnreg=None if is_chain else architecture().chain_registers,
        )
    return out


def sparse_decode_bwd(
    grad: Tensor, values: Tensor, indices: Tensor, dictionary: Tensor, need_values: bool, need_dictionary: bool
) -> tuple[Tensor, Tensor]:
    grad_values, grad_dictionary = (torch.empty(0, dtype=torch.float32, device=grad.device) for _ in range(2))
    num_codes, num_features = dictionary.shape
    rows = as_rows(grad)
    is_dense = grad.numel() > 0 and suits(rows.num_vectors, num_codes, num_features, indices.shape[-1], grad.dtype)
    if need_values:
        grad_values = torch.empty(indices.shape, dtype=torch.float32, device=grad.device)
        if grad.numel() > 0:
            (dense_decode_bwd_values if is_dense else _bwd_values)(rows, indices, dictionary, grad_values)
    if need_dictionary and is_dense:
        grad_dictionary = dense_decode_bwd_dictionary(rows, values, indices, num_codes)
    elif need_dictionary:
        atoms = flat_codes(indices, num_codes)
        grad_dictionary = segment_sum(rows, atoms, num_codes, values.contiguous())[:, :-1].contiguous()
    return grad_values, grad_dictionary


def _bwd_values(rows: Rows, indices: Tensor, dictionary: Tensor, out: Tensor) -> None:
    """Write the products of gradients [N, D] with the selected atoms to `out` [..., k] float32."""
    block_d = _block_d(dictionary.shape[1])
    block_p = _BLOCK // block_d
    with on_device(out):
        _sparse_decode_bwd_values_kernel[(triton.cdiv(indices.numel(), block_p),)](
            rows,
            indices.contiguous(),
            as_codes(dictionary),
            out,
            indices.shape[-1],
            BLOCK_P=block_p,
            BLOCK_D=block_d,
        )

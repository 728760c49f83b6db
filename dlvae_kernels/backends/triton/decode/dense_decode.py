"""`sparse_decode` with few atoms: k-hot coefficients times the dictionary on the matrix units, tile by tile.

An atom is read once for a block of vectors, not once for each vector that selects it. In return each vector compares k
indices with each of the K codes, and multiplies all K coefficients, most of which are 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import architecture, on_device, partition, wanted_programs
from ..language.products import multiply, multiply_sums, replace_non_finite
from ..language.rows import Rows, as_codes, as_rows, load_codes, load_rows, store_rows
from .k_hot import PADDED_ROWS, k_hot, pack_pairs

# The most tiles of vectors whose sums are added one after another (docs/numerics.md, section 9.1).
MAX_TILES = 64


def suits(num_vectors: int, num_codes: int, num_features: int, num_selected: int, dtype: torch.dtype) -> bool:
    """Whether dense coefficients are likely faster than k reads of atoms, by an estimate of both for one vector."""
    rates = architecture()
    sparse = num_selected * num_features * dtype.itemsize / rates.l2_bytes
    # Three TF32 products, each of which takes as long as two of half precision.
    products = 6 if dtype == torch.float32 else 1
    dense = num_selected * num_codes * triton.cdiv(num_features, _block_d(num_features)) / rates.comparisons
    dense += products * num_codes * max(16, num_features) / rates.half_products
    # A program takes a block of vectors: with few blocks, multiprocessors are idle.
    return max(num_vectors, PADDED_ROWS * wanted_programs() // 2) * dense < num_vectors * sparse


@triton.jit
def _dense_decode_fwd_kernel(
    pair_ptr,
    dictionary,
    out,
    num_selected,
    padded,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a block of features of a block of vectors."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for begin in tl.range(0, dictionary.num_codes, BLOCK_K, num_stages=1):
        k = begin + tl.arange(0, BLOCK_K)
        atoms = load_codes(dictionary, k, d)
        coefficients = tl.trans(k_hot(pair_ptr, n, k, num_selected, padded))
        atoms, total = replace_non_finite(coefficients, atoms, total)
        total = multiply_sums(coefficients, atoms, total, HALF)
    store_rows(out, total, n, d)


@triton.jit
def _dense_decode_bwd_dictionary_kernel(
    grad,
    pair_ptr,
    out_ptr,
    num_codes,
    num_selected,
    padded,
    tiles_each,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the sums of the gradients of one partition of vectors, times their coefficients: [partitions, K, D]."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    partition = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    begin = partition * tiles_each * BLOCK_N
    end = tl.minimum(begin + tiles_each * BLOCK_N, grad.num_vectors)
    for start in tl.range(begin, end, BLOCK_N, num_stages=1):
        n = start + tl.arange(0, BLOCK_N)
        y = load_rows(grad, n, d)
        coefficients = k_hot(pair_ptr, n, k, num_selected, padded)
        y, total = replace_non_finite(coefficients, y, total)
        total = multiply_sums(coefficients, y, total, HALF)
    out = out_ptr + (partition * num_codes + k)[:, None] * grad.num_features + d[None, :]
    tl.store(out, total, mask=(k < num_codes)[:, None] & (d < grad.num_features)[None, :])


@triton.jit
def _store_selected(
    out_ptr,
    index_ptr,
    products,
    n,
    first,
    num_vectors,
    num_codes,
    num_selected,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Write those products [BLOCK_N, BLOCK_K] of vectors n with codes `first` and up that the vectors selected."""
    for begin in range(0, num_selected, BLOCK_J):
        j = begin + tl.arange(0, BLOCK_J)
        at = n.to(tl.int64)[:, None] * num_selected + j[None, :]
        mask = (n < num_vectors)[:, None] & (j < num_selected)[None, :]
        index = tl.load(index_ptr + at, mask=mask, other=-1)
        is_here = (index >= first) & (index < tl.minimum(first + BLOCK_K, num_codes))
        found = tl.gather(products, tl.where(is_here, index - first, 0).to(tl.int32), axis=1)
        # The programs of the first codes write the zeros of indices out of range.
        is_outside = (first == 0) & ((index < 0) | (index >= num_codes))
        tl.store(out_ptr + at, tl.where(is_here, found, 0.0), mask=mask & (is_here | is_outside))


@triton.jit
def _dense_decode_bwd_values_kernel(
    grad,
    index_ptr,
    dictionary,
    out_ptr,
    num_selected,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Write the inner products of a block of gradients with a block of atoms where the vector selected the atom."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in tl.range(0, grad.num_features, BLOCK_D, num_stages=1):
        d = begin + tl.arange(0, BLOCK_D)
        atoms = load_codes(dictionary, first + tl.arange(0, BLOCK_K), d)
        products = multiply(load_rows(grad, n, d), tl.trans(atoms), products, HALF)
    sizes = grad.num_vectors, dictionary.num_codes, num_selected
    _store_selected(out_ptr, index_ptr, products, n, first, *sizes, BLOCK_K, BLOCK_J)


def _block_d(num_features: int) -> int:
    """The features of a block: the most that registers hold, since each block repeats the comparisons."""
    return min(architecture().decode_block_d, max(16, triton.next_power_of_2(num_features)))


def _is_half(dtype: torch.dtype, other: torch.dtype) -> bool:
    return dtype == other and dtype != torch.float32


def dense_decode_fwd(values: Tensor, indices: Tensor, dictionary: Tensor, out: Tensor) -> None:
    """Write the sums of atoms to `out` [..., D]."""
    num_codes, num_features = dictionary.shape
    with on_device(out):
        pairs = pack_pairs(indices, values, num_codes)
        num_selected, padded = pairs.shape
        block_d = _block_d(num_features)
        _dense_decode_fwd_kernel[(padded // PADDED_ROWS, triton.cdiv(num_features, block_d))](
            pairs,
            as_codes(dictionary),
            as_rows(out),
            num_selected,
            padded,
            HALF=_is_half(values.dtype, dictionary.dtype),
            BLOCK_N=PADDED_ROWS,
            BLOCK_K=32,
            BLOCK_D=block_d,
            num_warps=8,
        )


def dense_decode_bwd_dictionary(grad: Rows, values: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """The sums of gradients [N, D], each times its coefficient for an atom: [K, D] float32."""
    num_features, dtype = grad.num_features, grad.tensor.dtype
    block_n, block_k = 32, 64
    with on_device(grad.tensor):
        pairs = pack_pairs(indices, values, num_codes)
        block_d = _block_d(num_features)
        blocks = triton.cdiv(num_codes, block_k), triton.cdiv(num_features, block_d)
        tiles = triton.cdiv(grad.num_vectors, block_n)
        partitions, tiles_each = partition(blocks[0] * blocks[1], tiles, max_tiles=MAX_TILES)
        out = torch.empty(partitions, num_codes, num_features, dtype=torch.float32, device=grad.tensor.device)
        _dense_decode_bwd_dictionary_kernel[(*blocks, partitions)](
            grad,
            pairs,
            out,
            num_codes,
            *pairs.shape,
            tiles_each,
            HALF=_is_half(values.dtype, dtype),
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=8,
        )
    return out.sum(0)


def dense_decode_bwd_values(grad: Rows, indices: Tensor, dictionary: Tensor, out: Tensor) -> None:
    """Write the products of gradients [N, D] with the selected atoms to `out` [..., k] float32."""
    num_codes, num_features = dictionary.shape
    with on_device(out):
        _dense_decode_bwd_values_kernel[(triton.cdiv(grad.num_vectors, 64), triton.cdiv(num_codes, 128))](
            grad,
            indices.contiguous(),
            as_codes(dictionary),
            out,
            indices.shape[-1],
            HALF=_is_half(grad.tensor.dtype, dictionary.dtype),
            BLOCK_N=64,
            BLOCK_K=128,
            BLOCK_D=min(32, max(16, triton.next_power_of_2(num_features))),
            BLOCK_J=32,
            num_warps=8,
        )

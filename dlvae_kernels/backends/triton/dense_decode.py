"""Triton `sparse_decode` of few atoms: k-hot coefficients times the dictionary on the matrix units, tile by tile.

An atom is then read once for a block of rows, and not for each row that keeps it. The price is k comparisons for each
of the K coefficients of a row, and products of all of them, most of which are 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .k_hot import PADDED_ROWS, k_hot, pack_pairs
from .products import multiply, multiply_sums, set_apart
from .rows import Rows, as_rows, load_codes, load_rows, store_rows
from .tuning import INTERPRETED, WANTED_PROGRAMS, architecture, on_device, splits_of

# Of an H200, a second: bytes from the L2 cache; comparisons, of three instructions; products of half precision.
_BYTES, _COMPARISONS, _PRODUCTS = 5.5e12, 1e13, 2.5e14
# The most tiles of rows whose sums are added one after another: the error of such a chain grows with its length. The
# sums of all chains are added pairwise.
_MOST_TILES = 64


def suits(num_rows: int, num_atoms: int, num_features: int, kept: int, dtype: torch.dtype) -> bool:
    """Whether dense coefficients are likely the faster way, by an estimate of both for one row."""
    sparse = kept * num_features * dtype.itemsize / _BYTES
    # Three products of tf32, of which each takes two of half precision.
    products = 6 if dtype == torch.float32 else 1
    dense = kept * num_atoms * triton.cdiv(num_features, _block_d(num_features)) / _COMPARISONS
    dense += products * num_atoms * max(16, num_features) / _PRODUCTS
    # A program takes a block of rows: where there are few, multiprocessors are idle.
    return max(num_rows, PADDED_ROWS * WANTED_PROGRAMS // 2) * dense < num_rows * sparse


@triton.jit
def _dense_decode_fwd_kernel(
    pair_ptr,
    dictionary,
    out,
    kept,
    padded,
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of features of a block of rows."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for begin in tl.range(0, dictionary.num_rows, BLOCK_K, num_stages=1):
        k = begin + tl.arange(0, BLOCK_K)
        atoms = load_codes(dictionary, k, d)
        coefficients = tl.trans(k_hot(pair_ptr, n, k, kept, padded))
        atoms, total = set_apart(coefficients, atoms, total)
        total = multiply_sums(coefficients, atoms, total, HALF, UPCAST)
    store_rows(out, total, n, d)


@triton.jit
def _dense_decode_bwd_dictionary_kernel(
    grad,
    pair_ptr,
    out_ptr,
    num_atoms,
    kept,
    padded,
    tiles_per_split,
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of the rows of one split, times their coefficients: [splits, K, D]."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    begin = split * tiles_per_split * BLOCK_N
    end = tl.minimum(begin + tiles_per_split * BLOCK_N, grad.num_rows)
    for start in tl.range(begin, end, BLOCK_N, num_stages=1):
        n = start + tl.arange(0, BLOCK_N)
        rows = load_rows(grad, n, d)
        coefficients = k_hot(pair_ptr, n, k, kept, padded)
        rows, total = set_apart(coefficients, rows, total)
        total = multiply_sums(coefficients, rows, total, HALF, UPCAST)
    out = out_ptr + (split * num_atoms + k)[:, None] * grad.num_features + d[None, :]
    tl.store(out, total, mask=(k < num_atoms)[:, None] & (d < grad.num_features)[None, :])


@triton.jit
def _dense_decode_bwd_values_kernel(
    grad,
    index_ptr,
    dictionary,
    out_ptr,
    kept,
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Inner products of a block of rows with a block of atoms; each row writes those that it kept."""
    num_rows, num_atoms = grad.num_rows, dictionary.num_rows
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in tl.range(0, grad.num_features, BLOCK_D, num_stages=1):
        d = begin + tl.arange(0, BLOCK_D)
        atoms = load_codes(dictionary, k, d)
        products = multiply(load_rows(grad, n, d), tl.trans(atoms), products, HALF, UPCAST)
    for begin in range(0, kept, BLOCK_J):
        j = begin + tl.arange(0, BLOCK_J)
        at = n.to(tl.int64)[:, None] * kept + j[None, :]
        mask = (n < num_rows)[:, None] & (j < kept)[None, :]
        index = tl.load(index_ptr + at, mask=mask, other=-1)
        is_here = (index >= first) & (index < tl.minimum(first + BLOCK_K, num_atoms))
        found = tl.gather(products, tl.where(is_here, index - first, 0).to(tl.int32), axis=1)
        # The first programs write the zeros of indices out of range.
        is_outside = (first == 0) & ((index < 0) | (index >= num_atoms))
        tl.store(out_ptr + at, tl.where(is_here, found, 0.0), mask=mask & (is_here | is_outside))


def _block_d(num_features: int) -> int:
    """As many as registers hold: each block of features compares anew."""
    return min(256 if architecture() >= 90 else 128, max(16, triton.next_power_of_2(num_features)))


def _is_half(dtype: torch.dtype, other: torch.dtype) -> bool:
    return dtype == other and dtype != torch.float32


def dense_decode_fwd(values: Tensor, indices: Tensor, dictionary: Tensor, out: Tensor) -> None:
    """Write the sums of atoms to `out` [..., D]."""
    num_atoms, num_features = dictionary.shape
    with on_device(out):
        pairs = pack_pairs(indices, values, num_atoms)
        kept, padded = pairs.shape
        block = _block_d(num_features)
        _dense_decode_fwd_kernel[(padded // 64, triton.cdiv(num_features, block))](
            pairs,
            as_rows(dictionary),
            as_rows(out),
            kept,
            padded,
            HALF=_is_half(values.dtype, dictionary.dtype),
            UPCAST=INTERPRETED,
            BLOCK_N=64,
            BLOCK_K=32,
            BLOCK_D=block,
            num_warps=8,
        )


def dense_decode_bwd_dictionary(rows: Rows, values: Tensor, indices: Tensor, num_atoms: int) -> Tensor:
    """Sums of gradients [N, D], each times its coefficient for an atom: [K, D] float32."""
    x, num_features = rows.tensor, rows.num_features
    block_n, block_k = 32, 64
    with on_device(x):
        pairs = pack_pairs(indices, values, num_atoms)
        block_d = _block_d(num_features)
        blocks = triton.cdiv(num_atoms, block_k), triton.cdiv(num_features, block_d)
        tiles = triton.cdiv(rows.num_rows, block_n)
        splits, per_split = splits_of(blocks[0] * blocks[1], tiles, _MOST_TILES)
        out = torch.empty(splits, num_atoms, num_features, dtype=torch.float32, device=x.device)
        _dense_decode_bwd_dictionary_kernel[(*blocks, splits)](
            rows,
            pairs,
            out,
            num_atoms,
            *pairs.shape,
            per_split,
            HALF=_is_half(values.dtype, x.dtype),
            UPCAST=INTERPRETED,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=8,
        )
    return out.sum(0)


def dense_decode_bwd_values(rows: Rows, indices: Tensor, dictionary: Tensor, out: Tensor) -> None:
    """Write the products of gradients [N, D] with the atoms that their rows kept to `out` [..., k] float32."""
    num_atoms, num_features = dictionary.shape
    with on_device(out):
        _dense_decode_bwd_values_kernel[(triton.cdiv(rows.num_rows, 64), triton.cdiv(num_atoms, 128))](
            rows,
            indices.contiguous(),
            as_rows(dictionary),
            out,
            indices.shape[-1],
            HALF=_is_half(rows.tensor.dtype, dictionary.dtype),
            UPCAST=INTERPRETED,
            BLOCK_N=64,
            BLOCK_K=128,
            BLOCK_D=min(32, max(16, triton.next_power_of_2(num_features))),
            BLOCK_J=32,
            num_warps=8,
        )

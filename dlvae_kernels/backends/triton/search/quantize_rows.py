"""The last step of `vector_quantize`: write the assigned codes and half the errors of vectors, and count the codes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..language.rows import (
    Codes,
    Rows,
    codes_of_head,
    head_of_program,
    load_codes,
    load_rows,
    offset_of_head,
    store_like_rows,
    store_rows,
    vectors_of_head,
)

_BLOCK_N = 64


class Quantized(NamedTuple):
    """The outputs of `vector_quantize` beside indices and distances, and its mask.

    quantized: [N, D] the assigned codes.
    half_error: [N, D] (quantized - x) / 2 with the strides of quantized, or None if no backward pass follows.
    counts: [K] or [H, K] int64, to which each valid vector adds 1.
    mask: [N] bool, whether a vector is valid, or None: all are. Another vector gets index -1, distance 0, and zeros.
    """

    quantized: Rows
    half_error: Tensor | None
    counts: Tensor
    mask: Tensor | None


@triton.jit
def quantize_rows(
    x, codes, quantized, half_error_ptr, count_ptr, head, n, index, MASKED: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write the outputs (see `Quantized`) of vectors n, assigned to codes `index`, with MASKED or to none (-1).

    Args:
        x, codes, n: those of the head.
    """
    count_ptr += head * codes.num_codes
    if quantized.num_heads is not None:
        if half_error_ptr is not None:
            half_error_ptr += offset_of_head(quantized, head)
        quantized = Rows(
            quantized.tensor + offset_of_head(quantized, head),
            quantized.num_vectors // quantized.num_heads,
            *quantized[2:8],
        )
    is_valid = n < x.num_vectors
    if MASKED:
        is_valid &= index >= 0
    k = tl.where(is_valid, index, -1)
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        code = load_codes(codes, k, d)
        store_rows(quantized, code, n, d)
        if half_error_ptr is not None:
            # The difference of two float16 numbers may overflow float16; half of it does not.
            half = (code.to(tl.float32) - load_rows(x, n, d).to(tl.float32)) * 0.5
            if MASKED:
                half = tl.where(is_valid[:, None], half, 0.0)
            store_like_rows(half_error_ptr, quantized, half, n, d)
    # Integer additions give the same result in any order.
    tl.atomic_add(count_ptr + index, tl.full(index.shape, 1, tl.int64), mask=is_valid, sem="relaxed")


@triton.jit
def _quantize_rows_kernel(
    x,
    codes,
    index_ptr,
    distance_ptr,
    quantized,
    half_error_ptr,
    count_ptr,
    mask_ptr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the outputs of a block of vectors, and indices and distances where the mask changes them."""
    head = head_of_program(codes)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = vectors_of_head(codes, head, n)
    if codes.num_heads is not None:
        x = Rows(x.tensor + offset_of_head(x, head), x.num_vectors // x.num_heads, *x[2:8])
    codes = codes_of_head(codes, head)
    is_vector = n < x.num_vectors
    index = tl.load(index_ptr + place, mask=is_vector, other=0)
    if mask_ptr is not None:
        is_masked = is_vector & (tl.load(mask_ptr + place, mask=is_vector, other=1) == 0)
        index = tl.where(is_masked, -1, index)
        tl.store(index_ptr + place, index, mask=is_masked)
        tl.store(distance_ptr + place, tl.zeros([BLOCK_N], tl.float32), mask=is_masked)
    quantize_rows(x, codes, quantized, half_error_ptr, count_ptr, head, n, index, mask_ptr is not None, BLOCK_D)


def launch_quantize_rows(x: Rows, codes: Codes, indices: Tensor, distances: Tensor, out: Quantized) -> None:
    """Write `out` in a kernel of its own, and indices and distances of vectors that are not valid."""
    heads = codes.heads
    grid = (triton.cdiv(x.num_vectors // heads, _BLOCK_N), 1, heads)
    _quantize_rows_kernel[grid](x, codes, indices, distances, *out, BLOCK_N=_BLOCK_N, BLOCK_D=64)

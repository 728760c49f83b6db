"""The last step of `vector_quantize`: write the assigned codes and half the errors of vectors, and count the codes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..language.rows import Codes, Rows, load_codes, load_rows, store_like_rows, store_rows

_BLOCK_N = 64


class Quantized(NamedTuple):
    """The outputs of `vector_quantize` beside indices and distances.

    quantized: [N, D] the assigned codes.
    half_error: [N, D] (quantized - x) / 2 with the strides of quantized, or None if no backward pass follows.
    counts: [K] int64, to which each vector adds 1.
    """

    quantized: Rows
    half_error: Tensor | None
    counts: Tensor


@triton.jit
def quantize_rows(x, codes, quantized, half_error_ptr, count_ptr, n, index, BLOCK_D: tl.constexpr):
    """Write the outputs (see `Quantized`) of vectors n, which are assigned to codes `index`."""
    k = tl.where(n < x.num_vectors, index, -1)
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        code = load_codes(codes, k, d)
        store_rows(quantized, code, n, d)
        if half_error_ptr is not None:
            # The difference of two float16 numbers may overflow float16; half of it does not.
            half = (code.to(tl.float32) - load_rows(x, n, d).to(tl.float32)) * 0.5
            store_like_rows(half_error_ptr, quantized, half, n, d)
    # Integer additions give the same result in any order.
    tl.atomic_add(count_ptr + index, tl.full(index.shape, 1, tl.int64), mask=n < x.num_vectors, sem="relaxed")


@triton.jit
def _quantize_rows_kernel(
    x, codes, index_ptr, quantized, half_error_ptr, count_ptr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write the outputs of a block of vectors."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.load(index_ptr + n, mask=n < x.num_vectors, other=0)
    quantize_rows(x, codes, quantized, half_error_ptr, count_ptr, n, index, BLOCK_D)


def launch_quantize_rows(x: Rows, codes: Codes, indices: Tensor, out: Quantized) -> None:
    """Write `out` in a kernel of its own, where no program of the search sees all codes."""
    grid = (triton.cdiv(x.num_vectors, _BLOCK_N),)
    _quantize_rows_kernel[grid](x, codes, indices, *out, BLOCK_N=_BLOCK_N, BLOCK_D=64)

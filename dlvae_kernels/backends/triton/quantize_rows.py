"""The codes of rows whose indices are known, half their errors, and how often each code was taken."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .rows import Rows, as_rows, load_codes, load_rows, store_rows

_BLOCK_N = 64


class Quantized(NamedTuple):
    """quantized, half_error: [N, D], the second None if not wanted; counts: [K] int64, which each row adds to."""

    quantized: Rows
    half_error: Rows | None
    counts: Tensor


@triton.jit
def quantize_rows(x, codes, out, n, index, BLOCK_D: tl.constexpr):
    """Write codes `index` of rows n, and where it is wanted (code - x) / 2; count the codes."""
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        code = load_codes(codes, tl.where(n < x.num_rows, index, -1), d)
        store_rows(out.quantized, code, n, d)
        if out.half_error is not None:
            # Half of a difference of two float16 numbers is a float16 number.
            store_rows(out.half_error, (code.to(tl.float32) - load_rows(x, n, d).to(tl.float32)) * 0.5, n, d)
    # Integers add up the same in any order.
    tl.atomic_add(out.counts + index, tl.full(index.shape, 1, tl.int64), mask=n < x.num_rows, sem="relaxed")


@triton.jit
def _quantize_rows_kernel(x, codes, index_ptr, out, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    quantize_rows(x, codes, out, n, tl.load(index_ptr + n, mask=n < x.num_rows, other=0), BLOCK_D)


def launch_quantize_rows(rows: Rows, codebook: Tensor, indices: Tensor, out: Quantized) -> None:
    """What the search does by itself where one program sees all codes."""
    _quantize_rows_kernel[(triton.cdiv(rows.num_rows, _BLOCK_N),)](
        rows, as_rows(codebook), indices, out, BLOCK_N=_BLOCK_N, BLOCK_D=64
    )

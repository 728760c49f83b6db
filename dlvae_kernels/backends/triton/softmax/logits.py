"""Tiles of logits, which the forward and the backward pass compute bit by bit alike."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..architectures import INTERPRETED
from ..language.rows import Rows, load_rows

# exp of a lower logarithm is 0, which minus infinity would turn into NaN in p log p.
LEAST_LOGARITHM = tl.constexpr(-104.0)


@triton.jit
def inner_products(a, b, i, j, WIDE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inner products of vectors i of a with vectors j of b, [BLOCK_A, BLOCK_B] float32."""
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for begin in range(0, a.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        left = load_rows(a, i, d)
        right = load_rows(b, j, d)
        if WIDE:
            # Three TF32 products of high and low terms have the error of float32.
            left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right.T, acc=total, input_precision="tf32x3")
        else:
            total = tl.dot(left, right.T, acc=total)
    return total


def is_wide(a: Rows, b: Rows) -> bool:
    """Whether products are of float32; those of two numbers of one half-precision type are exact in float32."""
    dtype = a.tensor.dtype
    return INTERPRETED or dtype != b.tensor.dtype or dtype == torch.float32

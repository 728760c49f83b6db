"""Triton gradient of `rotation_trick`: norms, products and result in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .architectures import on_device
from .language.rotation import rotation_factors, rotation_scales
from .language.rows import as_rows, empty_like_rows, laid_out_like, load_rows, store_rows

_BLOCK_N = 32


@triton.jit
def _rotation_trick_bwd_kernel(grad, x, q, out, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the gradients of BLOCK_N vectors, which are read three times, BLOCK_D features at a time."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_squares = tl.zeros([BLOCK_N], tl.float32)
    q_squares = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        source, target = load_rows(x, n, d).to(tl.float32), load_rows(q, n, d).to(tl.float32)
        x_squares += tl.sum(source * source, axis=1)
        q_squares += tl.sum(target * target, axis=1)
    per_x, per_q, scale = rotation_scales(x_squares, q_squares)
    s_squares = tl.zeros([BLOCK_N], tl.float32)
    grad_s = tl.zeros([BLOCK_N], tl.float32)
    grad_t = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        g = load_rows(grad, n, d).to(tl.float32)
        t = load_rows(q, n, d).to(tl.float32) * per_q[:, None]
        s = load_rows(x, n, d).to(tl.float32) * per_x[:, None] + t
        s_squares += tl.sum(s * s, axis=1)
        grad_s += tl.sum(g * s, axis=1)
        grad_t += tl.sum(g * t, axis=1)
    along_s, along_e = rotation_factors(s_squares, grad_s, grad_t)
    for begin in range(0, x.num_features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        e = load_rows(x, n, d).to(tl.float32) * per_x[:, None]
        s = e + load_rows(q, n, d).to(tl.float32) * per_q[:, None]
        rotated = load_rows(grad, n, d).to(tl.float32) - along_s[:, None] * s + along_e[:, None] * e
        store_rows(out, scale[:, None] * rotated, n, d)


def rotation_trick_bwd(grad: Tensor, x: Tensor, q: Tensor) -> Tensor:
    rows = as_rows(x)
    grad_x = empty_like_rows(rows.tensor)
    if x.numel() > 0:
        with on_device(x):
            _rotation_trick_bwd_kernel[(triton.cdiv(rows.num_vectors, _BLOCK_N),)](
                as_rows(grad),
                rows,
                as_rows(q),
                as_rows(grad_x),
                BLOCK_N=_BLOCK_N,
                BLOCK_D=min(64, max(16, triton.next_power_of_2(rows.num_features))),
            )
    return laid_out_like(x, grad_x)

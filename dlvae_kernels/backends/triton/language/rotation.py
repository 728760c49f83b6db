"""The rotation trick (Fifty et al. 2024, arXiv:2410.06424) by sums over the features of each vector.

Let e = x / |x|, t = q / |q| and s = e + t. The gradient g becomes |q| / |x| (g - 2 (g.s) s / |s|^2 + 2 (g.t) e).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotation_scales(x_squares, q_squares):
    """1 / |x|, 1 / |q| and |q| / |x|, where norms below 1e-6 are divided by as 1e-6; from |x|^2 and |q|^2 [BLOCK_N]."""
    x_norm, q_norm = tl.sqrt(x_squares), tl.sqrt(q_squares)
    per_x = 1.0 / tl.maximum(x_norm, 1e-6)
    return per_x, 1.0 / tl.maximum(q_norm, 1e-6), q_norm * per_x


@triton.jit
def rotation_factors(s_squares, grad_s, grad_t):
    """The factors of s and of e; from |s|^2, g.s and g.t [BLOCK_N].

    A shorter s than 1e-6 is rounding error, of x and q in opposite directions: it counts as zero.
    """
    return tl.where(s_squares < 1e-12, 0.0, 2.0 * grad_s / s_squares), 2.0 * grad_t

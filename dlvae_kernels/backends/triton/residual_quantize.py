"""Triton `residual_quantize`: the search in `search/residual_search.py`, and sums over the levels in `sums/`.

The backward and the statistics compute the residuals again from x and the codes, by the subtractions of the search.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architectures import on_device
from .language.rotation import rotation_factors, rotation_scales
from .language.rows import (
    as_codes,
    as_rows,
    codes_of_head,
    empty_like_rows,
    laid_out_like,
    load_codes,
    load_rows,
    store_rows,
)
from .search.residual_search import ResidualOutputs, residual_search
from .sums.flat_codes import code_dtype
from .sums.one_hot_sum import one_hot_sum, suits
from .sums.segment_sum import segment_sum

# Elements of a block of whole vectors, and those of one warp.
_BLOCK, _BLOCK_OF_WARP = 2048, 512


@triton.jit
def _code_of_level(codebooks, index_ptr, n, num_vectors, level, num_levels, d):
    """The codes of vectors n at a level, float32 and 0 without a code; their indices, and whether there is a code."""
    index = tl.load(index_ptr + n.to(tl.int64) * num_levels + level, mask=n < num_vectors, other=-1)
    code = load_codes(codes_of_head(codebooks, level), index, d).to(tl.float32)
    return code, index, (index >= 0) & (index < codebooks.num_codes)


@triton.jit
def _rotate_gradient(grad, x, q):
    """The gradient of the rotation trick for whole vectors, [BLOCK_N, BLOCK_D]."""
    per_x, per_q, scale = rotation_scales(tl.sum(x * x, axis=1), tl.sum(q * q, axis=1))
    e, t = x * per_x[:, None], q * per_q[:, None]
    s = e + t
    along_s, along_e = rotation_factors(tl.sum(s * s, axis=1), tl.sum(grad * s, axis=1), tl.sum(grad * t, axis=1))
    return scale[:, None] * (grad - along_s[:, None] * s + along_e[:, None] * e)


@triton.jit
def _grad_x_kernel(
    grad,
    x,
    codebooks,
    index_ptr,
    weight_ptr,
    out,
    slope,
    num_levels,
    GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the gradient of whole vectors; weight_ptr [L]: the gradients of the commitment losses."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    g = load_rows(grad, n, d).to(tl.float32)
    first = load_rows(x, n, d).to(tl.float32)
    residual = first
    quantized = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    levels = tl.zeros([BLOCK_N], tl.float32)
    for level in range(num_levels):
        code, _, runs = _code_of_level(codebooks, index_ptr, n, x.num_vectors, level, num_levels, d)
        error = (residual - code) * (slope * tl.load(weight_ptr + level).to(tl.float32))
        if GRADIENT == "rotation_each":
            error += _rotate_gradient(g, residual, code)
        total += tl.where(runs[:, None], error, 0.0)
        residual -= code
        quantized += code
        levels += tl.where(runs, 1.0, 0.0)
    if GRADIENT == "each":
        total += g * levels[:, None]
    elif GRADIENT == "once":
        total += tl.where((levels > 0)[:, None], g, 0.0)
    elif GRADIENT == "rotation":
        total += tl.where((levels > 0)[:, None], _rotate_gradient(g, first, quantized), 0.0)
    store_rows(out, total, n, d)


@triton.jit
def _residuals_kernel(
    x,
    codebooks,
    index_ptr,
    out,
    code_ptr,
    num_levels,
    ERRORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write for each level the residuals that it quantizes and their codes, numbered over all levels.

    out: [L * N, D] float32, the residuals, or with ERRORS the codes minus the residuals.
    code_ptr: [L * N]; L * K (no code) also for a residual with NaN or infinity, unless ERRORS.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    residual = load_rows(x, n, d).to(tl.float32)
    for level in range(num_levels):
        code, index, is_valid = _code_of_level(codebooks, index_ptr, n, x.num_vectors, level, num_levels, d)
        place = tl.where(n < x.num_vectors, tl.cast(level, tl.int64) * x.num_vectors + n, out.num_vectors)
        if ERRORS:
            store_rows(out, code - residual, place, d)
        else:
            store_rows(out, residual, place, d)
            is_finite = tl.where(tl.abs(residual) < float("inf"), 1, 0)
            is_valid = is_valid & (tl.min(is_finite, axis=1) > 0)
        flat = tl.where(is_valid, level * codebooks.num_codes + index, num_levels * codebooks.num_codes)
        tl.store(code_ptr + place, flat.to(code_ptr.dtype.element_ty), mask=n < x.num_vectors)
        residual -= code


def _blocks(num_vectors: int, num_features: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the options of kernels whose blocks hold whole vectors."""
    block_d = triton.next_power_of_2(num_features)
    block_n = max(1, _BLOCK // block_d)
    warps = min(32, max(4, block_n * block_d // _BLOCK_OF_WARP))
    return (triton.cdiv(num_vectors, block_n),), {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps}


def _residuals(x: Tensor, indices: Tensor, codebooks: Tensor, errors: bool) -> tuple[Tensor, Tensor]:
    """The residuals of all levels, or the codes minus these, [L * N, D], and their codes over all levels [L * N]."""
    rows, (num_levels, num_codes, num_features) = as_rows(x), codebooks.shape
    out = torch.empty(num_levels * rows.num_vectors, num_features, dtype=torch.float32, device=x.device)
    codes = torch.empty(len(out), dtype=code_dtype(num_levels * num_codes), device=x.device)
    grid, options = _blocks(rows.num_vectors, num_features)
    with on_device(x):
        _residuals_kernel[grid](
            rows, as_codes(codebooks), indices.contiguous(), as_rows(out), codes, num_levels, ERRORS=errors, **options
        )
    return out, codes


def residual_quantize_fwd(
    x: Tensor, codebooks: Tensor, levels: Tensor | None, mask: Tensor | None, precision: str, gradient: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_levels, num_codes, _ = codebooks.shape
    if x.numel() == 0:
        losses = torch.zeros(num_levels, dtype=torch.float32, device=x.device)
        indices = torch.empty(*x.shape[:-1], num_levels, dtype=torch.int64, device=x.device)
        counts = torch.zeros(num_levels, num_codes, dtype=torch.int64, device=x.device)
        return torch.empty_like(x), indices, losses, losses.clone(), counts
    rows = as_rows(x)
    quantized = empty_like_rows(rows.tensor)
    codebook_loss = torch.empty(num_levels, dtype=torch.float32, device=x.device)
    out = ResidualOutputs(
        quantized=as_rows(quantized),
        indices=torch.empty(*x.shape[:-1], num_levels, dtype=torch.int64, device=x.device),
        counts=torch.empty(num_levels, num_codes, dtype=torch.int64, device=x.device),
        codebook_loss=codebook_loss,
        commitment_loss=torch.empty_like(codebook_loss),
    )
    runs = None if levels is None else levels.contiguous()
    valid = None if mask is None else mask.contiguous()
    residual_search(rows, codebooks, runs, valid, precision, out)
    return laid_out_like(x, quantized), out.indices, out.codebook_loss, out.commitment_loss, out.counts


def residual_quantize_bwd(
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    x: Tensor,
    indices: Tensor,
    codebooks: Tensor,
    gradient: str,
    need_x: bool,
    need_codebooks: bool,
) -> tuple[Tensor, Tensor]:
    num_levels, num_codes, num_features = codebooks.shape
    # Each loss is a mean over the elements of x of squares, whose gradient is twice the error divided by their number.
    slope = 2 / max(1, x.numel())
    grad_x = torch.empty(0, dtype=torch.float32, device=x.device)
    grad_codebooks = torch.empty_like(grad_x)
    if need_x:
        rows = as_rows(x)
        grad_x = empty_like_rows(rows.tensor)
        if x.numel() > 0:
            grid, options = _blocks(rows.num_vectors, num_features)
            with on_device(x):
                _grad_x_kernel[grid](
                    as_rows(grad_quantized),
                    rows,
                    as_codes(codebooks),
                    indices.contiguous(),
                    grad_commitment_loss.contiguous(),
                    as_rows(grad_x),
                    slope,
                    num_levels,
                    GRADIENT=gradient,
                    **options,
                )
        grad_x = laid_out_like(x, grad_x)
    if need_codebooks and x.numel() == 0:
        grad_codebooks = torch.zeros(codebooks.shape, dtype=torch.float32, device=x.device)
    elif need_codebooks:
        errors, codes = _residuals(x, indices, codebooks, errors=True)
        sums = segment_sum(as_rows(errors), codes, num_levels * num_codes)[:, :-1].view(codebooks.shape)
        grad_codebooks = sums * (slope * grad_codebook_loss)[:, None, None]
    return grad_x, grad_codebooks


def residual_statistics(x: Tensor, indices: Tensor, codebooks: Tensor) -> Tensor:
    num_levels, num_codes, num_features = codebooks.shape
    shape = num_levels, num_codes, num_features + 1
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    residuals, codes = _residuals(x, indices, codebooks, errors=False)
    rows = as_rows(residuals)
    if suits(rows, num_codes, num_levels):
        return one_hot_sum(rows, codes, num_codes, num_levels).view(shape)
    return segment_sum(rows, codes, num_levels * num_codes).view(shape)

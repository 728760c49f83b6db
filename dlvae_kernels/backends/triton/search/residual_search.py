"""The search of `residual_quantize`: one kernel in which a block of vectors passes through all levels.

The residuals of a block are float32 in scratch memory that its program alone reads and writes, in the caches of the
GPU. A level reads them as the search of one codebook reads its vectors, and keeps their terms on the chip where these
fit. With a certificate, uncertain vectors are searched again before the next residual is formed: an index that is not
exact would change all later levels.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..architectures import architecture, on_device, wanted_programs
from ..language.rows import Rows, as_codes, as_rows, codes_of_head, load_codes, load_rows, store_rows
from .codebook_terms import NUM_EXTREMES, codebook_terms
from .config import SearchConfig, search_config
from .kernel import search_block
from .rescan import search_again

# Features at a time of the steps that only copy or subtract.
_BLOCK_D = tl.constexpr(32)


class ResidualOutputs(NamedTuple):
    """The outputs of `residual_quantize`.

    quantized: [N, D] the sums of codes.
    indices: [N, L] int64, -1 for no code.
    counts: [L, K] int64.
    codebook_loss, commitment_loss: [L] float32, both with the same numbers.
    """

    quantized: Rows
    indices: Tensor
    counts: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


@triton.jit
def _subtract_codes(residual, codes, n, index):
    """Subtract the codes at the indices; -1 subtracts nothing."""
    for begin in range(0, residual.num_features, _BLOCK_D):
        d = begin + tl.arange(0, _BLOCK_D)
        code = load_codes(codes, index, d).to(tl.float32)
        store_rows(residual, load_rows(residual, n, d) - code, n, d)


@triton.jit
def _write_sums(codebooks, index_ptr, quantized, n, num_levels):
    """Write the sums of the codes of all levels, added in the order of the levels."""
    for begin in range(0, quantized.num_features, _BLOCK_D):
        d = begin + tl.arange(0, _BLOCK_D)
        total = tl.zeros([n.shape[0], _BLOCK_D], tl.float32)
        for level in range(num_levels):
            at = index_ptr + n.to(tl.int64) * num_levels + level
            index = tl.load(at, mask=n < quantized.num_vectors, other=-1)
            total += load_codes(codes_of_head(codebooks, level), index, d).to(tl.float32)
        store_rows(quantized, total, n, d)


@triton.jit
def _sum_of(part_ptr, count, BLOCK: tl.constexpr):
    """The sum of float64 numbers in a fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + place, mask=place < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def _write_losses(part_ptr, codebook_loss_ptr, commitment_loss_ptr, num_levels):
    """Write the losses of all levels from the parts [L + 1, programs] of all programs."""
    programs = tl.num_programs(0)
    num_valid = tl.maximum(_sum_of(part_ptr + num_levels * programs, programs, 256), 1.0)
    for level in range(num_levels):
        loss = (_sum_of(part_ptr + level * programs, programs, 256) / num_valid).to(tl.float32)
        tl.store(codebook_loss_ptr + level, loss)
        tl.store(commitment_loss_ptr + level, loss)


@triton.jit
def _residual_search_kernel(
    x,
    residual,
    codebooks,
    high_terms,
    low_terms,
    bias_ptr,
    extremes_ptr,
    level_ptr,
    mask_ptr,
    quantized,
    index_ptr,
    count_ptr,
    codebook_loss_ptr,
    commitment_loss_ptr,
    part_ptr,
    done_ptr,
    num_levels,
    num_tiles,
    distance_weight,
    CERTIFY: tl.constexpr,
    PADDED: tl.constexpr,
    TWO_TERMS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    COMPARE_D: tl.constexpr,
    TILE_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write all outputs for a block of vectors, and the losses from the last program that is done.

    residual: [N, D] float32 scratch.
    level_ptr, mask_ptr: bool, which levels run [L] and which vectors are valid [N]; None for all.
    part_ptr: [L + 1, programs] float64 scratch for the losses of each program, and its number of valid vectors.
    done_ptr: the number of programs that are done, 0 at the start.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_valid = n < x.num_vectors
    if mask_ptr is not None:
        is_valid = is_valid & (tl.load(mask_ptr + n, mask=is_valid, other=0) != 0)
    for start in range(0, x.num_features, _BLOCK_D):
        d = start + tl.arange(0, _BLOCK_D)
        store_rows(residual, load_rows(x, n, d), n, d)
    part_ptr_of_program = part_ptr + tl.program_id(0)
    for level in range(num_levels):
        runs = True
        if level_ptr is not None:
            runs = tl.load(level_ptr + level) != 0
        index = tl.full([BLOCK_N], -1, tl.int32)
        loss = tl.zeros([], tl.float64)
        # The threads of a program see what the others wrote after a barrier.
        tl.debug_barrier()
        if runs:
            codes = codes_of_head(codebooks, level)
            extremes_of_level = extremes_ptr + level * NUM_EXTREMES
            nearest, distance, winner, runner_up, bound = search_block(
                residual,
                codes,
                high_terms,
                low_terms,
                bias_ptr + level * num_tiles * BLOCK_K,
                extremes_of_level,
                n,
                level * num_tiles,
                0,
                num_tiles,
                distance_weight,
                CERTIFY,
                PADDED,
                TWO_TERMS,
                PACKED,
                PRECISION,
                BLOCK_N,
                BLOCK_K,
                BLOCK_D,
                GROUP,
                COMPARE_D,
                TILE_STAGES,
                STAGES,
            )
            if CERTIFY:
                # The negated comparison is true for NaN.
                is_uncertain = ((winner - runner_up > bound) == 0) & is_valid
                nearest, distance = search_again(
                    residual, codes, extremes_of_level, n, nearest, distance, is_uncertain, distance_weight, 64, 32
                )
            index = tl.where(is_valid, nearest, -1)
            loss = tl.sum(tl.where(is_valid, distance, 0.0).to(tl.float64), axis=0)
            # Integer additions give the same result in any order.
            ones = tl.full([BLOCK_N], 1, tl.int64)
            tl.atomic_add(count_ptr + level * codes.num_codes + index, ones, mask=is_valid, sem="relaxed")
            tl.debug_barrier()
            _subtract_codes(residual, codes, n, index)
        at = index_ptr + n.to(tl.int64) * num_levels + level
        tl.store(at, index.to(tl.int64), mask=n < x.num_vectors)
        tl.store(part_ptr_of_program + level * tl.num_programs(0), loss)
    tl.debug_barrier()
    _write_sums(codebooks, index_ptr, quantized, n, num_levels)
    num_valid = tl.sum(is_valid.to(tl.float64), axis=0)
    tl.store(part_ptr_of_program + num_levels * tl.num_programs(0), num_valid)
    tl.debug_barrier()
    if tl.atomic_add(done_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        _write_losses(part_ptr, codebook_loss_ptr, commitment_loss_ptr, num_levels)


def _config(num_vectors: int, num_features: int, num_codes: int, two_terms: bool, certifies: bool) -> SearchConfig:
    dtype = torch.float16 if two_terms else torch.float32
    config = search_config(num_features, num_codes, dtype, two_terms, certifies)
    # The state of the levels takes registers too.
    config = dataclasses.replace(config, max_registers=255)
    # A codebook is not partitioned, since the next level needs the result: small blocks occupy more multiprocessors.
    multiprocessors = wanted_programs() // architecture().programs_per_multiprocessor
    if triton.cdiv(num_vectors, config.block_n) < multiprocessors:
        config = dataclasses.replace(config, block_n=64, num_warps=4)
    return config


def residual_search(
    x: Rows, codebooks: Tensor, levels: Tensor | None, mask: Tensor | None, precision: str, out: ResidualOutputs
) -> None:
    """Write `out` for vectors x and codebooks [L, K, D], in three launches."""
    num_levels, num_codes, num_features = codebooks.shape
    two_terms = codebooks.dtype != torch.float32 or precision != "tf32"
    certifies = precision == "exact"
    device = codebooks.device
    codes = as_codes(codebooks)
    residual = torch.empty(x.num_vectors, num_features, dtype=torch.float32, device=device)
    with on_device(codebooks):
        config = _config(x.num_vectors, num_features, num_codes, two_terms, certifies)
        padded = config.padded(num_features)
        terms = codebook_terms(
            codes,
            padded=padded,
            block_k=config.block_k,
            dtype=torch.float16 if two_terms else torch.float32,
            two_terms=two_terms,
            packed=config.packed,
            counts=out.counts,
        )
        programs = triton.cdiv(x.num_vectors, config.block_n)
        parts = torch.empty(num_levels + 1, programs, dtype=torch.float64, device=device)
        block = [config.block_k, config.block_d]
        _residual_search_kernel[(programs,)](
            x,
            as_rows(residual),
            codes,
            TensorDescriptor.from_tensor(terms.high, block),
            TensorDescriptor.from_tensor(terms.low, block),
            terms.bias,
            terms.extremes,
            levels,
            mask,
            *out,
            parts,
            terms.extremes[..., -1],
            num_levels,
            triton.cdiv(num_codes, config.block_k),
            1.0 / num_features,
            CERTIFY=certifies,
            PADDED=padded,
            TWO_TERMS=two_terms,
            PACKED=config.packed,
            PRECISION="tf32" if precision == "tf32" else "ieee",
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_D=config.block_d,
            GROUP=config.group,
            COMPARE_D=config.compare_d,
            TILE_STAGES=config.num_stages if config.block_d == padded else 1,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            maxnreg=config.max_registers,
        )

"""The table of GPU architectures: every number that depends on the compute capability.

Functions that return block sizes for given sizes and dtypes (`search/config.py`, `topk/config.py`, `softmax/config.py`)
read it. No other file compares compute capabilities.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

# Triton's interpreter computes with NumPy, which has no bfloat16: kernels then multiply in float32.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED_CAPABILITY = 90


@dataclass(frozen=True)
class SearchBlocks:
    """Block sizes of the search for the nearest code."""

    block_k: int
    num_warps: int
    # Pairs of a code and a feature that one exact comparison loads at once; the second number where registers are few.
    compared: int
    compared_tight: int
    # The most features of a vector that stay on the chip while all tiles of codes stream past, by operands: two float16
    # terms, two terms with a certificate, half precision, TF32.
    resident_two_terms: int
    resident_two_terms_certified: int
    resident_half: int
    resident_tf32: int
    # Features at a time of a vector that does not stay: with two terms, and with one.
    chunk_two_terms: int
    chunk_one_term: int
    # The most registers of a thread for small tiles; 128 lets two programs share a multiprocessor.
    registers_small: int


@dataclass(frozen=True)
class Architecture:
    """The numbers of one compute capability, and of later ones without a row of their own."""

    # The driver reports the multiprocessors of a device. This number, of the largest GPU of the architecture, stands in
    # for it in the interpreter and where kernels are compiled without a GPU.
    multiprocessors: int
    # Bytes of shared memory that a program may use.
    shared_memory: int
    search: SearchBlocks
    # topk_codes, scores on the chip: features at a time, and stages of the pipeline.
    on_chip_block_d: int
    on_chip_stages: int
    # topk_codes, streamed tiles: codes of a tile.
    stream_block_k: int
    # sparse_decode with few atoms: the most features of a block, which registers bound.
    decode_block_d: int
    # sparse_decode with more atoms than a chain: the registers of a thread. With None the compiler chooses; it
    # would spill on Hopper.
    chain_registers: int | None
    # kept_softmax: codes of a tile; features at a time and the most features of a sum, for half precision and float32.
    softmax_block_k: int
    softmax_block_d: tuple[int, int]
    softmax_block_out: tuple[int, int]
    # Where fewer programs would run, their work is partitioned.
    programs_per_multiprocessor: int = 2
    # Peak rates of an H200, per second: bytes from the L2 cache, comparisons of three instructions, and multiply-adds
    # of half precision. They estimate which of two designs is faster, on all architectures so far.
    l2_bytes: float = 5.5e12
    comparisons: float = 1e13
    half_products: float = 2.5e14


TABLE = {
    # Ampere: operands pass through registers, and four warps keep all codes of a vector in one warp.
    80: Architecture(
        multiprocessors=108,
        shared_memory=163 * 1024,
        search=SearchBlocks(
            block_k=32,
            num_warps=4,
            compared=16,
            compared_tight=16,
            resident_two_terms=16,
            resident_two_terms_certified=16,
            resident_half=16,
            resident_tf32=16,
            chunk_two_terms=16,
            chunk_one_term=16,
            registers_small=255,
        ),
        on_chip_block_d=16,
        on_chip_stages=1,
        stream_block_k=64,
        decode_block_d=128,
        chain_registers=None,
        softmax_block_k=64,
        softmax_block_d=(32, 16),
        softmax_block_out=(128, 128),
    ),
    # Hopper: the matrix units read both operands from shared memory.
    90: Architecture(
        multiprocessors=132,
        shared_memory=227 * 1024,
        search=SearchBlocks(
            block_k=128,
            num_warps=8,
            compared=64,
            compared_tight=32,
            resident_two_terms=128,
            resident_two_terms_certified=64,
            resident_half=128,
            resident_tf32=128,
            chunk_two_terms=32,
            chunk_one_term=64,
            registers_small=128,
        ),
        on_chip_block_d=32,
        on_chip_stages=2,
        stream_block_k=128,
        decode_block_d=256,
        chain_registers=88,
        softmax_block_k=128,
        softmax_block_d=(64, 16),
        softmax_block_out=(256, 128),
    ),
    # Blackwell: the accumulator lies in tensor memory.
    100: Architecture(
        multiprocessors=148,
        shared_memory=227 * 1024,
        search=SearchBlocks(
            block_k=128,
            num_warps=8,
            compared=32,
            compared_tight=32,
            resident_two_terms=32,
            resident_two_terms_certified=32,
            resident_half=128,
            resident_tf32=64,
            chunk_two_terms=32,
            chunk_one_term=64,
            registers_small=255,
        ),
        on_chip_block_d=32,
        on_chip_stages=2,
        stream_block_k=64,
        decode_block_d=256,
        chain_registers=None,
        softmax_block_k=128,
        softmax_block_d=(64, 32),
        softmax_block_out=(256, 256),
    ),
}


def capability() -> int:
    """The compute capability of the current device, as 90; in the interpreter that of Hopper."""
    if INTERPRETED:
        return _INTERPRETED_CAPABILITY
    return _capability(triton.runtime.driver.active.get_current_device())


@lru_cache
def _capability(device: int) -> int:
    return int(triton.runtime.driver.active.get_current_target().arch)


def architecture() -> Architecture:
    """The row of the current device: that of the newest architecture that is not newer than the device."""
    current = capability()
    return TABLE[max(each for each in TABLE if each <= current)]


def wanted_programs() -> int:
    """The number of programs that fill the current device."""
    row = architecture()
    if INTERPRETED or not torch.cuda.is_available():
        return row.multiprocessors * row.programs_per_multiprocessor
    return _multiprocessors(torch.cuda.current_device()) * row.programs_per_multiprocessor


@lru_cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def partition(
    blocks: int, tiles: int, *, max_tiles: int | None = None, max_partitions: int | None = None
) -> tuple[int, int]:
    """How many partitions, of how many tiles each, make `blocks` blocks of work fill the current device.

    Args:
        max_tiles: the most tiles of a partition; without partitions it may have all.
        max_partitions: the most partitions; without, a partition may be one tile.
    """
    partitions = max(1, wanted_programs() // max(1, blocks))
    if max_partitions is not None:
        partitions = min(partitions, max_partitions)
    tiles_each = max(1, triton.cdiv(tiles, partitions))
    if max_tiles is not None:
        tiles_each = min(tiles_each, max_tiles)
    return triton.cdiv(tiles, tiles_each), tiles_each


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A context that makes the device of a tensor the current one, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

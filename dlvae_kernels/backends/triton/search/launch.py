"""The host side of the search for the nearest code.

It launches two kernels for the terms of the codebook, the search, and up to three kernels after it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..architectures import on_device, partition
from ..language.rows import Codes, Rows, as_codes
from . import autotune
from .codebook_terms import codebook_terms
from .config import SearchConfig, search_config
from .join_partitions import Found, join_partitions
from .kernel import _search_kernel
from .quantize_rows import Quantized, launch_quantize_rows
from .rescan import rescan

_MAX_PARTITIONS = 64


def search(
    x: Rows, codebook: Tensor, precision: str, indices: Tensor, distances: Tensor, quantized: Quantized | None = None
) -> None:
    """Write the nearest code of each vector, [N] int64, and its squared distance, [N] float32.

    Args:
        codebook: [K, D], or [H, K, D] with a codebook for each head; vector n belongs to head n % H.
        quantized: the other outputs of `vector_quantize`. The distances are then divided by D: a sum of squares may
            overflow float32 where the mean does not.
    """
    dtype = x.tensor.dtype
    # A product of two numbers of one half-precision type is exact in float32.
    two_terms = codebook.dtype != dtype or (dtype == torch.float32 and precision != "tf32")
    codes = as_codes(codebook)
    with on_device(x.tensor):
        config = search_config(
            x.num_features,
            codes.num_codes,
            torch.float16 if two_terms else dtype,
            two_terms,
            precision == "exact",
        )
        if autotune.is_wanted():
            heads = f" H={codes.heads}" if codes.heads > 1 else ""
            kind = f"{dtype} {codebook.dtype} {precision} D={x.num_features}{heads}"
            config = autotune.tuned(
                config,
                x.num_vectors,
                codes.num_codes,
                kind,
                lambda config: _search(x, codes, precision, two_terms, indices, distances, None, config),
            )
        _search(x, codes, precision, two_terms, indices, distances, quantized, config)


def _search(
    x: Rows,
    codes: Codes,
    precision: str,
    two_terms: bool,
    indices: Tensor,
    distances: Tensor,
    quantized: Quantized | None,
    config: SearchConfig,
) -> None:
    certifies = precision == "exact"
    heads = codes.heads
    distance_weight = 1.0 if quantized is None else 1.0 / x.num_features
    padded = config.padded(x.num_features)
    terms = codebook_terms(
        codes,
        padded=padded,
        block_k=config.block_k,
        dtype=torch.float16 if two_terms else x.tensor.dtype,
        two_terms=two_terms,
        packed=config.packed,
    )
    tiles = triton.cdiv(codes.num_codes, config.block_k)
    blocks = triton.cdiv(x.num_vectors // heads, config.block_n)
    partitions, tiles_each = partition(blocks * heads, tiles, max_partitions=_MAX_PARTITIONS)
    # One program sees all codes of its vectors and writes the results.
    is_final = partitions == 1 and not certifies
    # It writes the other outputs of `vector_quantize` too, without a mask; else a kernel of their own does.
    fused = quantized if is_final and quantized is not None and quantized.mask is None else None
    found = Found(indices, distances) if is_final else _buffers(partitions, x.num_vectors, certifies, indices.device)
    block = [config.block_k, config.block_d]
    _search_kernel[(blocks, partitions, heads)](
        x,
        codes,
        TensorDescriptor.from_tensor(terms.high, block),
        TensorDescriptor.from_tensor(terms.low, block),
        terms.bias,
        terms.extremes,
        found,
        *(fused[:3] if fused is not None else (None, None, None)),
        tiles,
        tiles_each,
        distance_weight,
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
    if not is_final:
        worklist, count = join_partitions(found, indices, distances)
        if certifies:
            rescan(x, codes, terms.extremes, indices, distances, worklist, count, distance_weight)
    if quantized is not None and fused is None:
        launch_quantize_rows(x, codes, indices, distances, quantized)


def _buffers(partitions: int, num_vectors: int, certifies: bool, device: torch.device) -> Found:
    index = torch.empty(partitions, num_vectors, dtype=torch.int32, device=device)
    distance = torch.empty(partitions, num_vectors, dtype=torch.float32, device=device)
    if not certifies:
        return Found(index, distance)
    score, second = torch.empty(2, partitions, num_vectors, dtype=torch.float32, device=device)
    return Found(index, distance, score, second, torch.empty(num_vectors, dtype=torch.float32, device=device))

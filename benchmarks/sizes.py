"""The sizes of real workloads, from the configurations of the projects that the workloads are named after."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from .inputs import Size

# N vectors, K codes, D features, and k selected codes.
CIFAR = Size("VQ-VAE, CIFAR-10", 16_384, 512, 64)
DICTIONARY = Size("dictionary VAE", 16_384, 512, 256, 100)
VQVAE2 = Size("VQ-VAE-2", 131_072, 512, 64)
VQGAN = Size("VQGAN", 3_072, 16_384, 256)
LLAMAGEN = Size("LlamaGen", 4_096, 16_384, 8)
VAR = Size("VAR", 680, 4_096, 32)
SOFT = Size("soft assignments", 4_096, 4_096, 32)
IBQ = Size("IBQ", 1_024, 262_144, 256)
ENCODEC = Size("EnCodec", 4_800, 1_024, 128)
DAC = Size("DAC", 2_357, 1_024, 8)
MIMI = Size("Mimi, streaming", 1, 2_048, 256)
# k is the number of levels.
ENCODEC_LEVELS = Size("EnCodec, 8 levels", 4_800, 1_024, 128, 8)
MIMI_LEVELS = Size("Mimi, streaming, 32 levels", 1, 2_048, 256, 32)
# k is the number of heads.
HEADS = Size("8 heads", 4_800, 1_024, 128, 8)
SEMANTIC = Size("semantic ids", 640, 256, 32)
LASER = Size("LASER", 2_048, 2_048, 256, 2)
SAE = Size("sparse autoencoder", 16_384, 32_768, 768, 32)
SAE_SMALL = Size("sparse autoencoder, small", 1_024, 4_096, 256, 32)
KMEANS = Size("k-means", 1_000_000, 8_192, 64)
CLUSTERS = Size("k-means, 1024 clusters", 1_000_000, 1_024, 64)
CLUSTERS_SMALL = Size("k-means, small", 65_536, 256, 64)
BITS_10 = Size("lookup-free, 10 bits", 4_800, 2**10, 10)
BITS_14 = Size("lookup-free, 14 bits", 1_024, 2**14, 14)
WIDE = Size("large codebook", 16_384, 8_192, 256)
FEATURES = Size("many features", 16_384, 512, 256)
WIDE_SMALL = Size("large codebook, small batch", 4_096, 8_192, 256)
ONE_VECTOR = Size("one vector", 1, 16, 64)
FINE = Size("large codebook, few features", 16_384, 16_384, 8)
LARGEST = Size("largest", 1_048_576, 262_144, 8)


def _growth(middle: Size, n: tuple[int, ...], k: tuple[int, ...], d: tuple[int, ...]) -> tuple[Size, ...]:
    """Sizes that show how the cost grows: the middle size, then one of N, K and D at a time varied from it."""
    vary = partial(dataclasses.replace, middle)
    return middle, *(vary(n=each) for each in n), *(vary(k=each) for each in k), *(vary(d=each) for each in d)


GROWTH = {
    "cpu": _growth(
        Size("growth", 4_096, 1_024, 64), n=(1_024, 16_384, 65_536), k=(256, 4_096, 16_384), d=(8, 256, 1_024)
    ),
    "cuda": _growth(
        Size("growth", 65_536, 1_024, 64),
        n=(4_096, 16_384, 262_144, 1_048_576),
        k=(256, 4_096, 16_384, 65_536),
        d=(8, 256, 1_024),
    ),
}


def half(size: Size) -> Size:
    return dataclasses.replace(size, dtype=torch.bfloat16)

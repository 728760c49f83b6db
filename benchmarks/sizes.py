"""Sizes that real users run, from the configurations of the projects that they are named after."""

from __future__ import annotations

import dataclasses

import torch

from .entry import Size

CIFAR = Size("VQ-VAE, CIFAR-10", 16_384, 512, 64)
DICTIONARY = Size("dictionary VAE", 16_384, 512, 256, 100)
VQVAE2 = Size("VQ-VAE-2", 131_072, 512, 64)
VQGAN = Size("VQGAN", 3_072, 16_384, 256)
LLAMAGEN = Size("LlamaGen", 4_096, 16_384, 8)
VAR = Size("VAR", 680, 4_096, 32)
IBQ = Size("IBQ", 1_024, 262_144, 256)
ENCODEC = Size("EnCodec", 4_800, 1_024, 128)
DAC = Size("DAC", 2_357, 1_024, 8)
MIMI = Size("Mimi, streaming", 1, 2_048, 256)
SEMANTIC = Size("semantic ids", 640, 256, 32)
LASER = Size("LASER", 2_048, 2_048, 256, 2)
SAE = Size("sparse autoencoder", 16_384, 32_768, 768, 32)
SAE_SMALL = Size("sparse autoencoder, small", 1_024, 4_096, 256, 32)
KMEANS = Size("k-means", 1_000_000, 8_192, 64)
WIDE = Size("large codebook", 16_384, 8_192, 256)
FEATURES = Size("many features", 16_384, 512, 256)
WIDE_SMALL = Size("large codebook, small batch", 4_096, 8_192, 256)
FINE = Size("large codebook, few features", 16_384, 16_384, 8)
LARGEST = Size("largest", 1_048_576, 262_144, 8)


def _growth(n: int, k: int, d: int, ns: tuple[int, ...], ks: tuple[int, ...], ds: tuple[int, ...]) -> tuple[Size, ...]:
    """How cost grows: one of N, K and D varied from a middle, which comes first."""
    middle = Size("growth", n, k, d)
    return (
        middle,
        *(dataclasses.replace(middle, n=each) for each in ns),
        *(dataclasses.replace(middle, k=each) for each in ks),
        *(dataclasses.replace(middle, d=each) for each in ds),
    )


GROWTH = {
    "cpu": _growth(4_096, 1_024, 64, (1_024, 16_384, 65_536), (256, 4_096, 16_384), (8, 256, 1_024)),
    "cuda": _growth(
        65_536, 1_024, 64, (4_096, 16_384, 262_144, 1_048_576), (256, 4_096, 16_384, 65_536), (8, 256, 1_024)
    ),
}


def half(size: Size) -> Size:
    return dataclasses.replace(size, dtype=torch.bfloat16)

"""The quantizers of vector-quantize-pytorch 1.32 under its names, on the operations of dlvae_kernels."""

from .residual_vq import GroupedResidualVQ, ResidualVQ
from .vector_quantize_pytorch import VectorQuantize

__all__ = ["GroupedResidualVQ", "ResidualVQ", "VectorQuantize"]

"""The quantizers of vector-quantize-pytorch 1.32 under its names, on the operations of dlvae_kernels."""

from .residual_sim_vq import ResidualSimVQ
from .sim_vq import SimVQ

__all__ = [
    "ResidualSimVQ",
    "SimVQ",
]

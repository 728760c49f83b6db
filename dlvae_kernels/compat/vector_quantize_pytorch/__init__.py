"""The quantizers of vector-quantize-pytorch 1.32 under its names, on the operations of dlvae_kernels."""

from __future__ import annotations

from typing import NoReturn

from .arguments import NOT_IMPLEMENTED
from .finite_scalar_quantization import FSQ
from .lookup_free_quantization import LFQ
from .random_projection_quantizer import RandomProjectionQuantizer
from .residual_fsq import GroupedResidualFSQ, ResidualFSQ
from .residual_lfq import GroupedResidualLFQ, ResidualLFQ
from .residual_sim_vq import ResidualSimVQ
from .residual_vq import GroupedResidualVQ, ResidualVQ
from .sim_vq import SimVQ
from .vector_quantize_pytorch import VectorQuantize

__all__ = [
    "FSQ",
    "LFQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
]


def __getattr__(name: str) -> NoReturn:
    if name not in NOT_IMPLEMENTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The text of an AttributeError would be lost in `from ... import`.
    raise ImportError(
        f"dlvae_kernels does not implement {name} of vector-quantize-pytorch; import it from the real package, before"
        " dlvae_kernels.compat.install(replace=True) where both are used"
    )

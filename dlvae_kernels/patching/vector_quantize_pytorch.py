"""The classes of vector-quantize-pytorch, which have a package of their own here."""

from __future__ import annotations

from torch import nn

from .handler import Handler

_REASON = "dlvae_kernels.compat.install() gives the package of this name, for the same checkpoints"


def recognise(module: nn.Module) -> str | None:
    return _REASON if type(module).__module__.split(".")[0] == "vector_quantize_pytorch" else None


HANDLER = Handler("forward", "", recognise)

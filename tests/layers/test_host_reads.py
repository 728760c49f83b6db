"""No quantizer reads a value on the host in a training step: on a GPU that would wait for the device."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dlvae_kernels import (
    FiniteScalarQuantizer,
    GroupedResidualVectorQuantizer,
    LookupFreeQuantizer,
    ResidualVectorQuantizer,
    SimVQ,
    VectorQuantizer,
    VectorQuantizerEMA,
)

K, D = 16, 6
LAYERS = {
    "gradient": lambda: VectorQuantizer(K, D, 0.25, dead_code_threshold="auto", init="kmeans"),
    "ema": lambda: VectorQuantizerEMA(K, D, 0.25, 0.9, init="kmeans"),
    "heads": lambda: VectorQuantizerEMA(K, D, 0.25, 0.9, num_heads=3),
    "cosine": lambda: VectorQuantizerEMA(K, D, 0.25, 0.9, metric="cosine", codebook_dim=4, gradient="rotation"),
    "residual": lambda: ResidualVectorQuantizer(3, K, D, quantizer_dropout=True),
    "residual, gradient": lambda: ResidualVectorQuantizer(3, K, D, decay=None, gradient="rotation_each"),
    "grouped": lambda: GroupedResidualVectorQuantizer(2, 3, K, D),
    "fsq": lambda: FiniteScalarQuantizer([5, 5, 5], D),
    "lfq": lambda: LookupFreeQuantizer(2**D),
    "sim_vq": lambda: SimVQ(D, K),
}
MASKED = ("gradient", "ema", "heads", "cosine", "residual", "residual, gradient", "grouped", "lfq")


class HostReads(TorchDispatchMode):
    """Lists the operations that copy a value to the host, but for tensors at the `ignored` addresses."""

    def __init__(self, ignored: Collection[int] = ()) -> None:
        super().__init__()
        self.found: list[str] = []
        self._ignored = ignored

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        is_read = func is torch.ops.aten._local_scalar_dense.default or "nonzero" in func.name()
        if is_read and args[0].data_ptr() not in self._ignored:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "is_masked"), [*((name, False) for name in LAYERS), *((name, True) for name in MASKED)]
)
def test_training_step_reads_nothing_on_the_host(name, is_masked):
    layer, x = LAYERS[name](), torch.randn(4, D, 20, requires_grad=True)
    options = {"mask": torch.rand(4, 20) < 0.7} if is_masked else {}
    # The first step initialises the codebook.
    layer(x, **options)
    with HostReads() as reads:
        floats = [value for value in layer(x, **options) if isinstance(value, torch.Tensor) and value.requires_grad]
        sum(value.sum() for value in floats).backward()
    assert reads.found == []


def test_host_reads_are_seen():
    with HostReads() as reads:
        torch.ones(3).sum().item()
    assert reads.found == ["aten::_local_scalar_dense"]

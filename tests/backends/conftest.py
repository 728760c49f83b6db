"""Fixtures of the tests of backends."""

from __future__ import annotations

import pytest
import torch

from tests.emulated_cuda import HAS_COMPILER, LIBRARY, make


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels as operations on tensors of the CPU."""
    if not HAS_COMPILER:
        pytest.skip("no make or no g++")
    make("cuda-emulated")
    torch.ops.load_library(LIBRARY)
    return torch.ops.dlvae_emulated

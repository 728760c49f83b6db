"""Fixtures of the tests of backends."""

from __future__ import annotations

import pytest
import torch

from dlvae_kernels.backends import BACKENDS
from tests.emulated_cuda import HAS_COMPILER, LIBRARY, make


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels as operations on tensors of the CPU."""
    # Unless tests/conftest.py has loaded one, which may be another build.
    if "emulated" not in BACKENDS:
        if not HAS_COMPILER:
            pytest.skip("no make or no g++")
        make("cuda-emulated")
        torch.ops.load_library(LIBRARY)
    return torch.ops.dlvae_emulated

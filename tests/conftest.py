"""Fixtures of all tests: each operation is tested on every (backend, device) pair that can run it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from dlvae_kernels import backends
from dlvae_kernels.backends import BACKENDS, native, unavailable_reason, use_backend
from dlvae_kernels.backends.reference import __all__ as ALL_OPS

from .emulated_cuda import EmulatedCuda

# tests/backends/test_cuda.py sets this variable for a separate process.
if emulated := os.environ.get("DLVAE_EMULATED_CUDA"):
    BACKENDS["emulated"] = EmulatedCuda(emulated)

_PAIRS = [(backend, device) for backend in BACKENDS for device in ("cpu", "cuda")]
# Markers that select the tests of a pair which needs a GPU or a simulation.
_PAIR_MARKERS = {
    ("triton", "cpu"): pytest.mark.interpreter,
    ("emulated", "cpu"): pytest.mark.emulator,
    **{(backend, "cuda"): pytest.mark.gpu for backend in BACKENDS},
}


def _missing(backend: str, device: str, ops: tuple[str, ...]) -> list[str]:
    """Why a backend cannot be tested on a device: one reason for each operation that is unavailable."""
    if device == "cuda" and not torch.cuda.is_available():
        return ["no CUDA device"] * len(ops)
    probe = torch.empty(0, device=device)
    return [reason for op in ops if (reason := unavailable_reason(backend, op, probe)) is not None]


def _instruction_sets(backend: str, device: str, definition: pytest.Function) -> list[str]:
    """Values of DLVAE_CPU to run a test with: the best set, or all for `every_isa`; "" leaves the variable as it is."""
    if (backend, device) != ("native", "cpu") or os.environ.get("DLVAE_CPU"):
        return [""]
    sets = native.instruction_sets()
    return sets if definition.get_closest_marker("every_isa") else sets[:1]


def pytest_report_header() -> list[str]:
    """List once what is not tested on this machine and why, instead of skipping each test."""
    lacks = {(backend, device): _missing(backend, device, tuple(ALL_OPS)) for backend, device in _PAIRS}
    return [
        f"not tested: {len(reasons)} of {len(ALL_OPS)} operations on {backend}-{device}: {reasons[0]}"
        for (backend, device), reasons in lacks.items()
        if reasons
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `device` on each (backend, device) pair that has all operations in OPS of its module.

    A backend may have several algorithms for one operation and select one by the sizes. The module lists them in WAYS,
    one suffix of the test's id for each, and forces the algorithm of the suffix; the test runs with each.
    """
    if "device" in metafunc.fixturenames:
        ways = getattr(metafunc.module, "WAYS", {})
        pairs = [
            pytest.param(
                (backend, device, cpu, way),
                id="-".join(filter(None, (backend, device, cpu))) + way,
                marks=_PAIR_MARKERS.get((backend, device), ()),
            )
            for backend, device in _PAIRS
            if not _missing(backend, device, metafunc.module.OPS)
            for cpu in _instruction_sets(backend, device, metafunc.definition)
            for way in ways.get(backend, ("",))
        ]
        metafunc.parametrize("device", pairs, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device, with the backend and the instruction set forced."""
    backend, name, cpu, _ = request.param
    is_float64 = request.node.get_closest_marker("float64") or torch.float64 in request.node.callspec.params.values()
    if backend != "reference" and is_float64:
        pytest.skip("only the reference supports float64")
    if cpu:
        monkeypatch.setenv("DLVAE_CPU", cpu)
    with use_backend(backend):
        yield torch.device(name)


@pytest.fixture(autouse=True)
def _fresh_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test without memoised routes, since tests replace what routes depend on."""
    monkeypatch.setattr(backends, "_routes", {})


@pytest.fixture
def without_vector_quantize_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the test as if vector-quantize-pytorch had not been imported, which `compat.install` requires."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vector_quantize_pytorch"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(autouse=True)
def _fill_uninitialised_memory() -> Iterator[None]:
    """Make `torch.empty` return NaN and extreme integers, so that an element that is never written fails a test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()

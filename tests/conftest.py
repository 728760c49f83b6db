"""Fixtures of all tests: each operation is tested at every place, a backend on a device, that can run it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from dlvae_kernels import backends
from dlvae_kernels.backends import BACKENDS, native, unavailable_reason, use_backend
from dlvae_kernels.backends.reference import __all__ as ALL_OPS

from .emulated_cuda import EmulatedCuda

# Named by tests/backends/test_cuda.py, in a process of its own.
if emulated := os.environ.get("DLVAE_EMULATED_CUDA"):
    BACKENDS["emulated"] = EmulatedCuda(emulated)

_PLACES = [(backend, device) for backend in BACKENDS for device in ("cpu", "cuda")]
# Places that only exist where a simulation runs them have a marker that selects their tests.
_PLACE_MARKERS = {
    ("triton", "cpu"): pytest.mark.interpreter,
    ("emulated", "cpu"): pytest.mark.emulator,
    **{(backend, "cuda"): pytest.mark.gpu for backend in BACKENDS},
}


def _missing(backend: str, device: str, ops: tuple[str, ...]) -> list[str]:
    """Why a backend cannot be tested on a device, a reason for each operation that it lacks."""
    if device == "cuda" and not torch.cuda.is_available():
        return ["no CUDA device"] * len(ops)
    probe = torch.empty(0, device=device)
    return [reason for op in ops if (reason := unavailable_reason(backend, op, probe)) is not None]


def _instruction_sets(backend: str, device: str, definition: pytest.Function) -> list[str]:
    """Values of DLVAE_CPU to run a test with: the best set, or all for `every_isa`; "" where there is no choice."""
    if (backend, device) != ("native", "cpu") or os.environ.get("DLVAE_CPU"):
        return [""]
    sets = native.instruction_sets()
    return sets if definition.get_closest_marker("every_isa") else sets[:1]


def pytest_report_header() -> list[str]:
    """List what is not tested here, with the reason: once, and not as a skip of each test."""
    lacks = {(backend, device): _missing(backend, device, tuple(ALL_OPS)) for backend, device in _PLACES}
    return [
        f"not tested: {len(reasons)} of {len(ALL_OPS)} operations on {backend}-{device}: {reasons[0]}"
        for (backend, device), reasons in lacks.items()
        if reasons
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `device` runs at each place that has all operations in OPS of its module.

    Where a backend has several WAYS, of which sizes choose one, it runs each of them; the module forces it.
    """
    if "device" in metafunc.fixturenames:
        ways = getattr(metafunc.module, "WAYS", {})
        places = [
            pytest.param(
                (backend, device, cpu, way),
                id="-".join(filter(None, (backend, device, cpu))) + way,
                marks=_PLACE_MARKERS.get((backend, device), ()),
            )
            for backend, device in _PLACES
            if not _missing(backend, device, metafunc.module.OPS)
            for cpu in _instruction_sets(backend, device, metafunc.definition)
            for way in ways.get(backend, ("",))
        ]
        metafunc.parametrize("device", places, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device, with the backend and the instruction set forced."""
    backend, name, cpu, _ = request.param
    takes_float64 = request.node.get_closest_marker("float64") or torch.float64 in request.node.callspec.params.values()
    if backend != "reference" and takes_float64:
        pytest.skip("float64 is the reference's alone")
    if cpu:
        monkeypatch.setenv("DLVAE_CPU", cpu)
    with use_backend(backend):
        yield torch.device(name)


@pytest.fixture(autouse=True)
def _fresh_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a router that has memoised nothing, since tests replace what routes depend on."""
    monkeypatch.setattr(backends, "_routes", {})


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """`torch.empty` gives NaN and extreme integers, so that an element that nobody wrote is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()

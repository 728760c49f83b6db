"""Every implementation of the registry, at a small size."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import measure
from benchmarks.baselines import library
from benchmarks.calls import MissingError
from benchmarks.inputs import Size, draw
from benchmarks.registry import ENTRIES
from benchmarks.results import ROOT
from dlvae_kernels.backends.reference import __all__ as ALL_OPS

CPU = torch.device("cpu")
# 128 vectors are the positions of two images.
SMALL = Size("small", 128, 40, 12, 3)
CASES = [
    pytest.param(entry, implementation, id=f"{entry.name}-{implementation.name}")
    for entry in ENTRIES.values()
    for implementation in entry.implementations
]


@pytest.mark.parametrize(("entry", "implementation"), CASES)
def test_implementations_match_float64(entry, implementation):
    size = dataclasses.replace(SMALL, selected=min(SMALL.selected, entry.sizes["cpu"][0].selected))
    result = measure.prepare(entry, implementation, draw(size, CPU, unit=entry.unit))
    if result.reason is not None:
        # `make setup` installs all baselines of the CPU; the others need a GPU.
        assert result.reason == "missing: needs a CUDA device"
        return
    assert not result.verdict.wrong
    sample = measure.sample(result, CPU)
    assert set(entry.work) <= set(sample) | {"backward"}
    assert all(value > 0 for value in sample.values())


def test_registry_has_an_entry_for_every_operation():
    assert {op for entry in ENTRIES.values() for op in entry.ops} == set(ALL_OPS)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_entries_are_complete(entry):
    assert (ROOT / entry.tests).is_file()
    assert entry.implementations[0].name == "dlvae_kernels"
    assert len({each.name for each in entry.implementations}) == len(entry.implementations)
    for device in ("cpu", "cuda"):
        sizes = entry.sizes[device]
        assert sizes
        assert len(set(sizes)) == len(sizes)
        assert all(work.bytes(size) > 0 for size in sizes for work in entry.work.values())


def test_tolerance_of_this_library_is_that_of_float32():
    size = dataclasses.replace(SMALL, dtype=torch.bfloat16)
    own, baseline = (ENTRIES["nearest_code"].implementations[i] for i in (0, 2))
    assert own.tolerance_at(size) == own.tolerance_at(SMALL)
    assert baseline.tolerance_at(size).relative > own.tolerance_at(size).relative


def test_inputs_have_their_size_and_repeat_with_the_seed():
    size = dataclasses.replace(SMALL, dtype=torch.bfloat16)
    one, same, other = (draw(size, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(one.x, same.x)
    assert not torch.equal(one.x, other.x)
    assert one.x.dtype == torch.bfloat16
    assert one.map.shape == (2, 12, 8, 8)
    assert torch.equal(one.map[0, :, 0, 1], one.x[1])
    torch.testing.assert_close(draw(SMALL, CPU, unit=True).codes.norm(dim=1), torch.ones(SMALL.k))


def test_library_that_is_not_installed_raises_with_its_extra():
    with pytest.raises(MissingError, match=r"no_such_library.*'bench'"):
        library("no_such_library")

"""Every contender of the registry, at a small size."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import measure
from benchmarks.entry import MissingError, Size, draw
from benchmarks.registry import ENTRIES
from dlvae_kernels.backends.reference import __all__ as ALL_OPS

CPU = torch.device("cpu")
# 128 rows are two images.
SMALL = Size("small", 128, 40, 8, 3)
CASES = [
    pytest.param(entry, contender, id=f"{entry.name}-{contender.name}")
    for entry in ENTRIES.values()
    for contender in entry.contenders
]


@pytest.mark.parametrize(("entry", "contender"), CASES)
def test_everyone_who_is_here_is_right(entry, contender):
    size = dataclasses.replace(SMALL, kept=min(SMALL.kept, entry.sizes["cpu"][0].kept))
    result = measure.prepare(entry, contender, [draw(size, CPU, unit=entry.unit)])
    if result.reason is not None:
        # What `make setup` installs must run; the rest needs a GPU.
        assert result.reason == "missing: it needs a CUDA device"
        return
    assert not result.verdict.wrong
    sample = measure.sample(result, CPU)
    assert set(entry.work) <= set(sample) | {"backward"}
    assert all(value > 0 for value in sample.values())


def test_every_operation_has_an_entry():
    assert {op for entry in ENTRIES.values() for op in entry.ops} == set(ALL_OPS)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_entries_are_whole(entry):
    from benchmarks.results import ROOT

    assert (ROOT / entry.tests).is_file()
    assert entry.contenders[0].name == "dlvae_kernels"
    assert entry.contenders[0].exact
    assert len({each.name for each in entry.contenders}) == len(entry.contenders)
    for device in ("cpu", "cuda"):
        sizes = entry.sizes[device]
        assert sizes
        assert len(set(sizes)) == len(sizes)
        for size in sizes:
            for work in entry.work.values():
                assert work(size).bytes > 0


def test_inputs_are_of_their_size_and_repeat():
    size = dataclasses.replace(SMALL, dtype=torch.bfloat16)
    one, same, other = (draw(size, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(one.x, same.x)
    assert not torch.equal(one.x, other.x)
    assert one.x.dtype == torch.bfloat16
    assert one.map.shape == (2, 8, 8, 8)
    assert torch.equal(one.map[0, :, 0, 1], one.x[1])
    torch.testing.assert_close(draw(SMALL, CPU, unit=True).codes.norm(dim=1), torch.ones(SMALL.k))


def test_a_library_that_is_not_installed_is_named():
    from benchmarks.baselines import library

    with pytest.raises(MissingError, match=r"no_such_library.*'bench'"):
        library("no_such_library")

"""The measuring harness: ratios, verdicts, reasons, backends, peak memory and ceilings."""

from __future__ import annotations

import time

import pytest
import torch

import dlvae_kernels as dlvae
from benchmarks import judge, measure, memory, results, run
from benchmarks.calls import Call, MissingError
from benchmarks.ceilings import Ceilings
from benchmarks.entry import Entry, Implementation, Work
from benchmarks.inputs import Size

CPU = torch.device("cpu")
SIZE = Size("test", 2_000, 40, 6)
# 10^9 operations and 10^9 bytes a second. A pass has 2 * 2000 * 40 * 6 operations: 0.96 ms.
CEILINGS = Ceilings({"float32": 1e9}, 1e9)


def fast(inputs):
    indices = dlvae.nearest_code(inputs.x, inputs.codes)
    return Call(lambda: indices)


def slow(inputs):
    indices = dlvae.nearest_code(inputs.x, inputs.codes)
    return Call(lambda: (time.sleep(0.02), indices)[1])


def one_in_a_thousand_wrong(inputs):
    indices = dlvae.nearest_code(inputs.x, inputs.codes)
    indices[::1000] = (indices[::1000] + 1) % inputs.size.k
    return Call(lambda: indices)


def missing(inputs):
    raise MissingError("no such library")


def failing(inputs):
    raise RuntimeError("a bug")


def race(*baselines, library=fast, **options):
    """Results and rows of this library and of baselines (name, prepare)."""
    implementations = tuple(Implementation(*each) for each in (("dlvae_kernels", library), *baselines))
    work = Work(pairs=1)
    entry = Entry("nearest_code", "", ("nearest_code",), {"cpu": (SIZE,)}, implementations, judge.nearest, work)
    found = measure.race(entry, SIZE, CPU, seconds=0.1, memory=False, **options)
    return found, measure.rows(found, entry, SIZE, CEILINGS)


def test_rows_state_ratios_to_this_library_with_their_spread():
    _, (own, baseline) = race(("slow", slow), backend="reference")
    assert own["ratio"] == own["ratio_p80"] == "1.000"
    assert float(baseline["ms"]) > 20
    assert float(baseline["ratio"]) > 2
    assert float(baseline["ratio_p20"]) <= float(baseline["ratio"]) <= float(baseline["ratio_p80"])
    assert own["backend"] == "reference"
    assert float(own["limit_percent"]) == pytest.approx(96 / float(own["ms"]), rel=0.05)


def test_rows_of_a_wrong_answer_are_flagged(capsys):
    _, rows = race(("wrong", one_in_a_thousand_wrong))
    assert [row["status"] for row in rows] == ["ok", "wrong"]
    assert float(rows[1]["differing"]) == pytest.approx(0.001)
    assert not run.is_library_wrong(rows)
    _, rows = race(library=one_in_a_thousand_wrong)
    assert run.is_library_wrong(rows)
    assert "INVALID: nearest_code at 2000 x 40 x 6: wrong, error" in capsys.readouterr().out


def test_rows_of_a_missing_or_failing_baseline_state_the_reason():
    _, rows = race(("missing", missing), ("failing", failing))
    assert [row["status"] for row in rows] == ["ok", "missing: no such library", "failed: RuntimeError: a bug"]
    assert "ms" not in rows[1]
    assert results.line(rows[1]).endswith(rows[1]["status"])


def test_race_with_a_failure_of_this_library_still_times_the_baselines(capsys):
    _, rows = race(("slow", slow), library=failing)
    assert [row["status"] for row in rows] == ["failed: RuntimeError: a bug", "ok"]
    assert "ratio" not in rows[1]
    assert 'raise RuntimeError("a bug")' in capsys.readouterr().err
    assert run.is_library_wrong(rows)
    assert "INVALID: nearest_code at 2000 x 40 x 6: failed: RuntimeError: a bug" in capsys.readouterr().out
    _, rows = race(library=failing)
    assert len(rows) == 1


def test_race_takes_the_named_baselines_and_the_forced_backend():
    found, _ = race(("slow", slow), ("wrong", one_in_a_thousand_wrong), names=["slow"])
    assert [each.implementation.name for each in found] == ["dlvae_kernels", "slow"]
    with pytest.raises(dlvae.BackendUnavailable):
        race(backend="triton")


def test_peak_memory_contains_the_distance_matrix():
    size = Size("test", 4_000, 500, 8)
    entry = run.ENTRIES["nearest_code"]
    (plain,) = (each for each in entry.implementations if each.name == "plain PyTorch")
    peak = memory.peak_on_cpu(entry, size, plain, None)
    assert peak.keys() == {"forward"}
    # The N x K matrix has 8 MB, and its temporaries have several times as much.
    assert 8 <= peak["forward"] < 40


def test_ceilings_bound_the_time_by_operations_and_by_bytes():
    size = Size("test", 10, 5, 2, 3)
    ceilings = Ceilings({"float32": 100.0}, 10.0)
    assert ceilings.seconds(Work(pairs=1), size, "float32") == 2 * 10 * 5 * 2 / 100
    assert ceilings.seconds(Work(selected=2), size, "bfloat16") == 2 * 2 * 10 * 3 * 2 / 100
    assert ceilings.seconds(Work(pairs=1, vectors=2, indices=1), size, "float32") == (2 * 80 + 240) / 10
    assert {row["implementation"] for row in ceilings.rows()} == {"copy", "matrix product, float32"}

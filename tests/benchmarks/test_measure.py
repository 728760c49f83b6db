from __future__ import annotations

import time

import pytest
import torch

import dlvae_kernels as dlvae
from benchmarks import judge, measure, memory, results, run
from benchmarks.ceilings import Ceilings
from benchmarks.entry import Call, Contender, Entry, MissingError, Size, Work

CPU = torch.device("cpu")
SIZE = Size("test", 2_000, 40, 6)
CEILINGS = Ceilings({"float32": 1e9}, 1e9)


def search(inputs):
    return Call(lambda: dlvae.nearest_code(inputs.x, inputs.codes))


def slow(inputs):
    return Call(lambda: (time.sleep(0.02), dlvae.nearest_code(inputs.x, inputs.codes))[1])


def one_in_a_thousand_off(inputs):
    indices = dlvae.nearest_code(inputs.x, inputs.codes)
    indices[::1000] = (indices[::1000] + 1) % inputs.size.k
    return Call(lambda: indices)


def entry(*others, ours=search):
    contenders = (Contender("dlvae_kernels", ours, exact=True), *others)
    work = {"forward": lambda size: Work(1e6, 1e3)}
    return Entry("nearest_code", "", ("nearest_code",), {"cpu": (SIZE,)}, contenders, judge.nearest, work)


def race(of, **options):
    found = measure.race(of, SIZE, CPU, seconds=0.1, memory=False, **options)
    return found, measure.rows(found, of, SIZE, CEILINGS)


def test_ratios_are_over_ours_with_their_spread():
    _, (ours, other) = race(entry(Contender("slow", slow)), backend="reference")
    assert ours["ratio"] == ours["ratio_p80"] == "1.000"
    assert float(other["ms"]) > 20
    assert float(other["ratio"]) > 2
    assert float(other["ratio_p20"]) <= float(other["ratio"]) <= float(other["ratio_p80"])
    assert ours["backend"] == "reference"
    # 10^6 operations at 10^9 a second are a millisecond.
    assert float(ours["limit_percent"]) == pytest.approx(100 / float(ours["ms"]), rel=0.05)


def test_a_wrong_kernel_is_flagged(capsys):
    _, rows = race(entry(Contender("off", one_in_a_thousand_off)))
    assert [row["status"] for row in rows] == ["ok", "wrong"]
    assert float(rows[1]["differing"]) == pytest.approx(0.001)
    assert not run.any_of_ours_is_wrong(rows)
    _, rows = race(entry(ours=one_in_a_thousand_off))
    assert run.any_of_ours_is_wrong(rows)
    assert "WRONG: nearest_code at 2000 x 40 x 6" in capsys.readouterr().out


def test_who_is_missing_or_fails_says_why():
    def missing(inputs):
        raise MissingError("no such library")

    def failing(inputs):
        return Call(lambda: torch.zeros(2) @ torch.zeros(3))

    _, rows = race(entry(Contender("missing", missing), Contender("failing", failing)))
    assert [row["status"].split(":")[0] for row in rows] == ["ok", "missing", "failed"]
    assert "no such library" in rows[1]["status"]
    assert "RuntimeError" in rows[2]["status"]
    assert "ms" not in rows[1]
    assert results.line(rows[1]).endswith(rows[1]["status"])


def test_a_failure_of_ours_is_told_and_the_others_are_timed(capsys):
    def failing(inputs):
        raise RuntimeError("a bug")

    _, rows = race(entry(Contender("slow", slow), ours=failing))
    assert [row["status"] for row in rows] == ["failed: RuntimeError: a bug", "ok"]
    assert "ratio" not in rows[1]
    assert 'raise RuntimeError("a bug")' in capsys.readouterr().err
    assert run.any_of_ours_is_wrong(rows)
    assert "FAILED: nearest_code at 2000 x 40 x 6: failed: RuntimeError: a bug" in capsys.readouterr().out
    _, rows = race(entry(ours=failing))
    assert len(rows) == 1


def test_baselines_can_be_chosen_and_ours_forced():
    of = entry(Contender("slow", slow), Contender("off", one_in_a_thousand_off))
    found, _ = race(of, names=["slow"])
    assert [each.contender.name for each in found] == ["dlvae_kernels", "slow"]
    with pytest.raises(dlvae.BackendUnavailable):
        race(of, backend="triton")


def test_peak_memory_is_seen():
    size = Size("test", 4_000, 500, 8)
    of = run.ENTRIES["nearest_code"]
    peaks = {
        each.name: memory.peak_on_cpu(of, size, each, None)
        for each in of.contenders
        if each.name in ("dlvae_kernels", "plain PyTorch")
    }
    # The matrix of distances takes 8 MB, and its temporaries as much again.
    assert peaks["plain PyTorch"].keys() == {"forward"}
    assert 8 <= peaks["plain PyTorch"]["forward"] < 40


def test_limits():
    ceilings = Ceilings({"float32": 100.0}, 10.0)
    assert ceilings.seconds(Work(200, 10), "float32") == 2
    assert ceilings.seconds(Work(100, 50), "float32") == 5
    assert {row["contender"] for row in ceilings.rows()} == {"copy", "matrix product, float32"}

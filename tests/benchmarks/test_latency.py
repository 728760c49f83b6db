"""`python -m benchmarks latency`: rows, targets and the table of docs/benchmarks.md."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import __main__, latency, readme, results
from dlvae_kernels.backends import native

NEEDS_LIBRARY = pytest.mark.skipif(
    native.library_unavailable_reason() is not None, reason=str(native.library_unavailable_reason())
)


@NEEDS_LIBRARY
def test_latency_writes_a_row_for_each_implementation_with_the_difference(tmp_path, capsys):
    path = tmp_path / "latency.csv"
    assert __main__.main(["latency", "--size", "2x4x3", "--seconds", "0.1", "--csv", str(path)]) == 0
    rows = results.read(path)
    names = [(row["op"], row["implementation"]) for row in rows]
    assert names == [
        *(("nearest_code", "dlvae_kernels"), ("nearest_code", "native operation")),
        *(("gather_codes", "dlvae_kernels"), ("gather_codes", "F.embedding")),
    ]
    for row in rows:
        assert (row["size"], row["status"], row["instruction_set"]) == ("2 x 4 x 3", "ok", native.instruction_set())
        assert 0 < float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"])
        assert (row["over_us"] != "") == (row["implementation"] == "dlvae_kernels")
        assert row["device"]
        assert row["versions"]
        assert row["commit"]
    # The public function does all that the native operation does, and more.
    assert float(rows[0]["over_us"]) > 0
    printed = capsys.readouterr().out
    assert "us longer than the native operation" in printed
    # The targets are those of other sizes.
    assert printed.count("not measured") == 2
    table = readme._latency(rows, path.name)
    assert f"| gather_codes | 2 x 4 x 3 | F.embedding | {rows[3]['us']} |  |" in table


@NEEDS_LIBRARY
def test_latency_of_a_wrong_answer_fails(tmp_path, monkeypatch):
    entry = latency.ENTRIES["gather_codes"]
    wrong = latency._GATHER.plain("dlvae_kernels", lambda codes, indices: codes[indices] + 1)
    monkeypatch.setitem(
        latency.ENTRIES, "gather_codes", dataclasses.replace(entry, implementations=(wrong, entry.implementations[1]))
    )
    assert __main__.main(["latency", "--size", "2x4x3", "--seconds", "0.1", "--csv", str(tmp_path / "a.csv")]) == 1

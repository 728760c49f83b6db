"""The command line: list, selection, results, plots, pytest-benchmark and verify."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__, plot, results, run, verify
from benchmarks.inputs import Size
from benchmarks.registry import ENTRIES

CPU = torch.device("cpu")


def test_command_without_arguments_lists_entries_and_baselines(capsys):
    assert __main__.main([]) == 0
    listed = capsys.readouterr().out
    for entry in ENTRIES.values():
        assert f"\n{entry.name}\n" in f"\n{listed}"
        assert all(each.name in listed for each in entry.implementations[1:])


def test_command_with_a_selection_writes_its_rows(tmp_path, capsys):
    path = tmp_path / "deeper" / "rows.csv"
    words = ["--op", "one_hot", "--size", "64x10x3", "--baseline", "scatter_", "--csv", str(path)]
    assert __main__.main(words) == 0
    rows = [row for row in results.read(path) if row["op"] != "ceiling"]
    assert [row["implementation"] for row in rows] == ["dlvae_kernels", "scatter_"]
    assert {row["size"] for row in rows} == {"64 x 10 x 3"}
    assert all(row["status"] == "ok" and float(row["ms"]) > 0 and row["peak_mb"] for row in rows)
    assert f"torch {torch.__version__}" in rows[0]["versions"]
    assert not path.with_suffix(".partial").exists()
    assert "scatter_" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "nearest"], "expected op to be one of nearest_code"),
        (["--size", "nobody's"], "or part of the name of a workload, got nobody's"),
        (["--size", "0x3x3"], "at least 1, got '0x3x3'"),
        (["--baseline", "numpy"], "expected baseline to be one of"),
        (["--device", "tpu"], "tpu"),
        (["updates", "--rounds", "0"], "expected rounds to be an integer of at least 1, got 0"),
        (
            ["--op", "one_hot", "--size", "8x4x2", "--backend", "cublas"],
            "expected name to be one of triton, native, reference, got 'cublas'",
        ),
        (["verify", "--op", "one_hot", "--size", "8x4x2", "--base", "no-such-commit"], "got 'no-such-commit'"),
    ],
)
def test_command_with_a_wrong_argument_names_it(words, message, capsys, monkeypatch):
    monkeypatch.setattr(verify, "_test", lambda entry: 0)
    assert __main__.main(words) == 1
    assert message in capsys.readouterr().err


def test_sizes_are_selected_by_name_or_number():
    (case,) = run.select(["nearest_code"], ["vqgan"], CPU)
    assert case[1].k == 16_384
    (case,) = run.select(["topk_codes"], ["10 x 20 x 3 x 2"], CPU)
    assert case[1] == Size("custom", 10, 20, 3, 2)


def test_results_of_an_interrupted_run_keep_the_old_file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("old")

    def interrupted():
        with results.writing(path, ["op"]) as add:
            add([{"op": "new"}])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert path.with_suffix(".partial").read_text() == "op\nnew\n"


def test_rows_after_the_deadline_are_left_out(capsys):
    cases = run.select(["one_hot"], ["8x4x2"], CPU)
    *_, rows = run.rows(cases, CPU, deadline=0)
    assert [row["status"] for row in rows] == ["left out: the time was used up"]
    assert "left out" in capsys.readouterr().out


def test_commit_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("DLVAE_COMMIT", "abc")
    assert results.commit.__wrapped__() == "abc"


@pytest.mark.parametrize("csv", sorted(results.FOLDER.glob("[cg]pu.csv")), ids=lambda path: path.name)
def test_plots_are_those_of_the_committed_rows(csv, tmp_path):
    from PIL import Image

    digest = hashlib.sha256(csv.read_bytes()).hexdigest()
    for drawn in plot.write(csv, tmp_path):
        with Image.open(results.FOLDER / drawn.name) as committed, Image.open(drawn) as fresh:
            assert committed.info["Source"] == digest, "run `python -m benchmarks plot`"
            assert fresh.convert("L").getextrema()[0] < 128


def test_registry_runs_through_pytest_benchmark():
    words = ["-m", "pytest", "benchmarks", "-q", "-k", "semantic and (kernels or cdist or flash)"]
    # A worker of pytest-xdist turns pytest-benchmark off.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, *words]
    result = subprocess.run(command, cwd=results.ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    # Two implementations run, two need a GPU (one is the CUDA C++ of this library), and a search has no backward.
    assert "2 passed, 6 skipped" in result.stdout
    assert "benchmark 'nearest_code forward, semantic ids: 640 x 256 x 32'" in result.stdout


def test_verify_with_a_failing_test_refuses_to_measure(tmp_path, monkeypatch):
    tests = tmp_path / "test_failing.py"
    tests.write_text("def test_failing():\n    assert False\n")
    monkeypatch.setitem(ENTRIES, "one_hot", dataclasses.replace(ENTRIES["one_hot"], tests=str(tests)))
    monkeypatch.setattr(verify, "_worker", lambda *arguments: pytest.fail("it measured"))
    with pytest.raises(verify.RefusedError, match="a time without passing tests is not valid"):
        verify.verify("one_hot", ["64x10x3"], "HEAD", CPU)


def test_verify_imports_no_models():
    """The base of a comparison may have another models/ than this tree."""
    code = "import sys, benchmarks.verify; print(*(name for name in sys.modules if name.split('.')[0] == 'models'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


@pytest.mark.slow
def test_verify_times_this_tree_and_a_commit(monkeypatch):
    monkeypatch.setattr(verify, "_test", lambda entry: 0)
    (line,) = verify.verify("one_hot", ["64x10x3"], "HEAD", CPU)
    assert line.startswith("64 x 10 x 3, forward: ")
    assert line.endswith(("no difference", "faster", "SLOWER"))
    listed = subprocess.run(["git", "worktree", "list"], cwd=results.ROOT, capture_output=True, text=True).stdout
    assert "dlvae-base" not in listed


@pytest.mark.parametrize(
    ("pairs", "outcome"),
    [
        ([(2.0, 1.0)] * 5, "2.00x (2.00 to 2.00): faster"),
        ([(1.0, 2.0)] * 5, "SLOWER"),
        ([(1.01, 1.0)] * 5, "no difference"),
        ([(2.0, 1.0), (1.0, 2.0)] * 5, "no difference"),
    ],
)
def test_verify_calls_only_clear_changes_a_difference(pairs, outcome):
    assert verify._line("a", pairs).endswith(outcome)

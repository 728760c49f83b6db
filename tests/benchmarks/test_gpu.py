"""`python -m benchmarks gpu` without a GPU: wheels, build, and how steps share the time."""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile

import pytest
import torch

from benchmarks import __main__, gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_gpu_without_a_device_fails(capsys):
    assert __main__.main(["gpu"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_wheels_are_installed_for_this_process_and_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    wheels, site = tmp_path / ".whl", tmp_path / "site"
    wheels.mkdir()
    info = "carried_thing-1.0.dist-info"
    with zipfile.ZipFile(wheels / "carried_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_thing.py", "WORD = 'here'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    gpu.install_wheels(wheels, site)
    code = "import carried_thing; print(carried_thing.WORD)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "here\n"
    import carried_thing

    assert carried_thing.WORD == "here"


def test_wheels_that_do_not_exist_are_reported(tmp_path, capsys):
    gpu.install_wheels(tmp_path / ".whl", tmp_path)
    assert "no wheels" in capsys.readouterr().out


def test_build_runs_if_the_sources_exist(tmp_path, monkeypatch):
    calls = []

    def fail(words, **options):
        calls.append((words[1:], options["cwd"]))
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr(subprocess, "run", fail)
    assert gpu.build(tmp_path) == 0
    assert calls == []
    (tmp_path / "csrc").mkdir()
    assert gpu.build(tmp_path) == 3
    assert calls == [(["setup.py", "build_ext", "--inplace"], tmp_path)]


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Replaces the steps by steps without a GPU; the seconds that each was given."""
    given = {}

    def step(name, status):
        def take(out, seconds):
            given[name] = seconds
            return status

        return take

    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("build", "install_wheels", "_cuda_kernels"):
        monkeypatch.setattr(gpu, name, lambda *words: 0)
    weights = {
        "tests": (60, step("tests", -11)),
        "benchmark": (30, step("benchmark", 0)),
        "last": (10, step("last", 0)),
    }
    monkeypatch.setattr(gpu, "STEPS", weights)
    return given


def test_steps_share_the_time_and_report_a_crash(steps, capsys):
    assert gpu.main(seconds=100) == 1
    # The steps take no time, so later steps get the time that earlier steps left.
    assert steps == pytest.approx({"tests": 60, "benchmark": 75, "last": 100}, rel=0.05)
    printed = capsys.readouterr().out
    assert "tests: failed (-11), benchmark: ok, last: ok" in printed
    assert "not measured: nearest_code" in printed


def test_steps_that_are_chosen_share_all_the_time(steps, capsys):
    assert gpu.main(only=["last"], seconds=50) == 0
    assert steps == pytest.approx({"last": 50}, rel=0.05)
    assert "not measured" not in capsys.readouterr().out


def test_targets_of_a_stopped_benchmark_use_its_partial_rows(steps, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    for name in ("gpu.csv", "gpu.partial"):
        (tmp_path / "out" / name).write_text(f"op\n{name}\n")
    monkeypatch.setattr(gpu.targets, "check", lambda rows, device: [row["op"] for row in rows])
    gpu.main(seconds=50, only=["benchmark"])
    assert capsys.readouterr().out.splitlines()[0] == "gpu.partial"


def test_call_keeps_the_output_and_the_status(tmp_path, capsys):
    assert gpu.call(tmp_path / "a.log", 60, sys.executable, "-c", "print('found'); raise SystemExit(3)") == 3
    assert (tmp_path / "a.log").read_text() == "found\n"
    assert capsys.readouterr().out == "--- a\nfound\n\n"


def test_call_that_exceeds_the_time_ends_with_its_children(tmp_path, capsys):
    child = "import time; print(1, flush=True); time.sleep(99)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    assert gpu.call(tmp_path / "a.log", 3, sys.executable, "-c", code) == 124
    assert time.monotonic() - begin < 30
    assert "a: exceeded 3 s\n1\n" in capsys.readouterr().out
    assert "KeyboardInterrupt" in (tmp_path / "a.log").read_text()

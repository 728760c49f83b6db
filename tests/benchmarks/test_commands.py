from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from benchmarks import __main__, ceilings, gpu, plot, results, run, training, updates, verify
from benchmarks.entry import Entry, Size
from benchmarks.registry import ENTRIES

CPU = torch.device("cpu")


def test_without_words_it_lists(capsys):
    assert __main__.main([]) == 0
    listed = capsys.readouterr().out
    for entry in ENTRIES.values():
        assert f"\n{entry.name}\n" in f"\n{listed}"
        assert all(contender.name in listed for contender in entry.contenders[1:])


def test_a_selection_is_measured_into_a_file(tmp_path, capsys):
    path = tmp_path / "deeper" / "rows.csv"
    words = ["--op", "one_hot", "--size", "64x10x3", "--baseline", "scatter_", "--csv", str(path)]
    assert __main__.main(words) == 0
    rows = [row for row in results.read(path) if row["op"] != "ceiling"]
    assert [row["contender"] for row in rows] == ["dlvae_kernels", "scatter_"]
    assert {row["size"] for row in rows} == {"64 x 10 x 3"}
    assert all(row["status"] == "ok" and float(row["ms"]) > 0 and row["peak_mb"] for row in rows)
    assert f"torch {torch.__version__}" in rows[0]["versions"]
    assert not path.with_suffix(".partial").exists()
    assert "scatter_" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "nearest"], "op is 'nearest'; it needs to be one of nearest_code"),
        (["--size", "nobody's"], "size is nobody's; it needs to be"),
        (["--size", "0x3x3"], "numbers need to be at least 1"),
        (["--baseline", "numpy"], "baseline is 'numpy'; it needs to be one of"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["updates", "--rounds", "0"], "expected rounds to be a whole number of at least 1, got 0"),
        (
            ["--op", "one_hot", "--size", "8x4x2", "--backend", "cublas"],
            "expected name to be one of triton, native, reference, got 'cublas'",
        ),
        (["verify", "--op", "one_hot", "--size", "8x4x2", "--base", "no-such-commit"], "base is 'no-such-commit'"),
    ],
)
def test_bad_words(words, message, capsys, monkeypatch):
    monkeypatch.setattr(verify, "_test", lambda entry: 0)
    assert __main__.main(words) == 1
    assert message in capsys.readouterr().err


def test_sizes_are_selected():
    (case,) = run.select(["nearest_code"], ["vqgan"], CPU)
    assert case[1].k == 16_384
    (case,) = run.select(["topk_codes"], ["10 x 20 x 3 x 2"], CPU)
    assert case[1] == Size("custom", 10, 20, 3, 2)


def test_what_is_interrupted_keeps_the_old_file(tmp_path):
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


def test_what_a_deadline_leaves_out_is_said(capsys):
    cases = run.select(["one_hot"], ["8x4x2"], CPU)
    *_, rows = run.rows(cases, CPU, deadline=0)
    assert [row["status"] for row in rows] == ["left out: no time was left"]
    assert "left out" in capsys.readouterr().out


def test_two_files_are_compared():
    def row(contender, ratio):
        keys = ("op", "pass", "workload", "size", "precision", "ratio_p20", "ratio_p80")
        return {**dict.fromkeys(keys, "-"), "contender": contender, "ratio": ratio}

    first = [row("ours", "1.000"), row("a", "2.0"), row("b", "0.50"), row("gone", "")]
    second = [row("ours", "1.000"), row("a", "2.2"), row("b", "0.40"), row("gone", "")]
    apart, agree = results.compare(first, second)
    assert "b: 0.50 (- to -) and 0.40 (- to -)" in apart
    assert agree == "1 of 2 ratios agree within 15%, their median change is 17.5%"


def test_the_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("DLVAE_COMMIT", "abc")
    assert results.commit.__wrapped__() == "abc"


@pytest.mark.parametrize("csv", sorted(results.FOLDER.glob("[cg]pu.csv")), ids=lambda path: path.name)
def test_pictures_are_not_stale(csv, tmp_path):
    from PIL import Image

    digest = hashlib.sha256(csv.read_bytes()).hexdigest()
    for drawn in plot.write(csv, tmp_path):
        with Image.open(results.FOLDER / drawn.name) as committed, Image.open(drawn) as fresh:
            assert committed.info["Source"] == digest, "run `python -m benchmarks plot`"
            assert fresh.convert("L").getextrema()[0] < 128


def test_the_registry_runs_through_pytest_benchmark():
    words = ["-m", "pytest", "benchmarks", "-q", "-k", "semantic and (kernels or cdist or flash)"]
    result = subprocess.run([sys.executable, *words], cwd=results.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    # Two contenders run, two need a GPU (ours in CUDA C++ is one), and a search has no backward.
    assert "2 passed, 6 skipped" in result.stdout
    assert "benchmark 'nearest_code forward, semantic ids: 640 x 256 x 32'" in result.stdout


# --- verify ---


def broken(tmp_path):
    tests = tmp_path / "test_red.py"
    tests.write_text("def test_red():\n    assert False\n")
    return Entry(**{**vars(ENTRIES["one_hot"]), "tests": str(tests)})


def test_a_red_test_is_no_speed_up(tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("timed nevertheless")

    monkeypatch.setattr(verify, "_Worker", never)
    with pytest.raises(verify.RefusedError, match="a time on a red test is worth nothing"):
        verify.verify(broken(tmp_path), [Size("test", 64, 10, 3)], "HEAD", CPU)


@pytest.mark.slow
def test_this_tree_is_timed_against_a_commit(monkeypatch):
    monkeypatch.setattr(verify, "_test", lambda entry: 0)
    (line,) = verify.verify(ENTRIES["one_hot"], [Size("test", 64, 10, 3)], "HEAD", CPU)
    assert line.startswith("64 x 10 x 3, forward: ")
    assert line.endswith(("no difference", "faster", "SLOWER"))
    listed = subprocess.run(["git", "worktree", "list"], cwd=results.ROOT, capture_output=True, text=True).stdout
    assert "dlvae-base" not in listed


def test_outcomes():
    assert verify._line("a", [(2.0, 1.0)] * 5).endswith("2.00x (2.00 to 2.00): faster")
    assert verify._line("a", [(1.0, 2.0)] * 5).endswith("SLOWER")
    assert verify._line("a", [(1.01, 1.0)] * 5).endswith("no difference")
    assert verify._line("a", [(2.0, 1.0), (1.0, 2.0)] * 5).endswith("no difference")


# --- updates ---


@pytest.mark.slow
def test_updates_are_timed_beside_the_notebooks_loop(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ceilings, "has_products", lambda device, dtype: False)
    monkeypatch.setattr(ceilings, "product_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(ceilings, "convolution_rate", lambda device, dtype: 1e10)
    path = tmp_path / "updates.csv"
    updates.measure(CPU, path, updates=2, rounds=1, batch_size=4)
    rows = results.read(path)
    names = [(row["model"], row["contender"]) for row in rows]
    assert names == [(model, name) for model in updates.MODELS for name in ("dlvae_kernels", "notebook")]
    for row in rows:
        rate = float(row["updates_per_second"])
        assert float(row["projected_seconds"]) == pytest.approx(200_000 / rate, rel=1e-2)
        assert float(row["limit_percent"]) == pytest.approx(float(row["gflop"]) * rate, rel=2e-2)
        assert 0 < float(row["nmse"]) < 20
    assert "updates/s" in capsys.readouterr().out


# --- gpu ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so(capsys):
    assert __main__.main(["gpu"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_carried_wheels_are_brought(tmp_path, monkeypatch):
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
    gpu.bring_wheels(wheels, site)
    code = "import carried_thing; print(carried_thing.WORD)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "here\n"
    import carried_thing

    assert carried_thing.WORD == "here"


def test_without_wheels_it_says_so(tmp_path, capsys):
    gpu.bring_wheels(tmp_path / ".whl", tmp_path)
    assert "no wheels" in capsys.readouterr().out


def test_csrc_is_built_where_it_is(tmp_path, monkeypatch):
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
    """Steps of a GPU suite without a GPU, and the seconds that each was given."""
    given = {}

    def step(name, status):
        def take(out, seconds):
            given[name] = seconds
            return status

        return take

    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("build", "bring_wheels", "_cuda_kernels"):
        monkeypatch.setattr(gpu, name, lambda *words: 0)
    shares = {"tests": (60, step("tests", -11)), "benchmark": (30, step("benchmark", 0)), "last": (10, step("last", 0))}
    monkeypatch.setattr(gpu, "STEPS", shares)
    return given


def test_steps_share_the_time_and_one_that_crashes_counts(steps, capsys):
    assert gpu.main(seconds=100) == 1
    # Nothing took time, so that the later ones have more of it.
    assert steps == pytest.approx({"tests": 60, "benchmark": 75, "last": 100}, rel=0.05)
    printed = capsys.readouterr().out
    assert "tests: failed (-11), benchmark: ok, last: ok" in printed
    assert "not measured: nearest_code" in printed


def test_steps_can_be_chosen(steps, capsys):
    assert gpu.main(only=["last"], seconds=50) == 0
    assert steps == pytest.approx({"last": 50}, rel=0.05)
    assert "not measured" not in capsys.readouterr().out


def test_of_a_stopped_benchmark_its_own_rows_are_checked(steps, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    for name in ("gpu.csv", "gpu.partial"):
        (tmp_path / "out" / name).write_text(f"op\n{name}\n")
    monkeypatch.setattr(gpu.targets, "check", lambda rows, device: [row["op"] for row in rows])
    gpu.main(seconds=50, only=["benchmark"])
    assert capsys.readouterr().out.splitlines()[0] == "gpu.partial"


def test_a_step_leaves_its_output(tmp_path, capsys):
    assert gpu.call(tmp_path / "a.log", 60, sys.executable, "-c", "print('found'); raise SystemExit(3)") == 3
    assert (tmp_path / "a.log").read_text() == "found\n"
    assert capsys.readouterr().out == "--- a\nfound\n\n"


def test_a_step_that_takes_too_long_ends_with_its_children(tmp_path, capsys):
    child = "import time; print(1, flush=True); time.sleep(99)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    assert gpu.call(tmp_path / "a.log", 3, sys.executable, "-c", code) == 124
    assert time.monotonic() - begin < 30
    assert "a: took more than 3 s\n1\n" in capsys.readouterr().out
    assert "KeyboardInterrupt" in (tmp_path / "a.log").read_text()


def test_training_has_images_without_scikit_image(monkeypatch, capsys):
    from models.training.data import load

    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(training, "_CROPS", 10)
    name = training.images.__wrapped__()
    assert "scikit-image is not installed" in capsys.readouterr().out
    assert len(load(name, results.ROOT).train) == 18

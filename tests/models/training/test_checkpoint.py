"""Broken files in the folder of a run end a command with one line, and nothing is changed."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import train
from models.report.__main__ import main as report_main
from models.training import checkpoint
from models.training.config import Config, parse
from models.training.run import Run

from ..broken_runs import BROKEN_CHECKPOINTS, BROKEN_CONFIGURATIONS, BROKEN_METRICS, CHECKPOINT, rewritten
from ..runs import ROOT, rows

BROKEN = {**BROKEN_CHECKPOINTS, **BROKEN_CONFIGURATIONS, **BROKEN_METRICS}
MALLOC_DEBUG = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")


@pytest.fixture(scope="module")
def saved(images, tmp_path_factory):
    """The folder of a run that was stopped after 10 updates of 20."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run = Run(parse([*images, "--updates", "20", "--out", str(folder)]).config, folder)
    run.start()
    run.config = parse([*images, "--updates", "10"]).config
    assert run.train()
    return folder


@pytest.fixture
def broken(request, saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    BROKEN[request.param][0](folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "run.lock"}


def exit_status(main, *words):
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("command", ["train", "report"])
@pytest.mark.parametrize(("broken", "named"), [(name, BROKEN[name][1]) for name in BROKEN], indirect=["broken"])
def test_command_with_broken_file_ends_with_one_line(command, broken, named, capsys):
    before = contents(broken)
    status = exit_status(report_main, broken) if command == "report" else exit_status(train.main, "--resume", broken)
    (line,) = capsys.readouterr().err.splitlines()
    assert status in (1, 2), line
    assert re.match(f"error: .*({named})", line), line
    assert contents(broken) == before


def state(run):
    """A copy of the state that a checkpoint restores."""
    moments = [dict(run.optimizer.state[parameter]) for parameter in run.model.parameters()]
    tensors = dict(run.model.state_dict()) | dict(run.model.named_buffers())
    return copy.deepcopy((tensors, moments, torch.get_rng_state()))


@pytest.mark.parametrize("broken", BROKEN_CHECKPOINTS, indirect=True)
def test_load_of_broken_file_changes_nothing(broken, saved):
    run = Run(Config.read(saved / "config.json"), saved)
    checkpoint.load(saved / CHECKPOINT, run.model, run.optimizer)
    with torch.no_grad():
        next(run.model.parameters()).add_(1)
    torch.manual_seed(7)
    before = state(run)
    message = rf"^{broken / CHECKPOINT} is not a valid checkpoint of this run: .*; restore it from a copy, or delete it"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(broken / CHECKPOINT, run.model, run.optimizer)
    torch.testing.assert_close(state(run), before, rtol=0, atol=0)


def test_load_restores_weights_moments_and_random_state(saved):
    run = Run(Config.read(saved / "config.json"), saved)
    progress = checkpoint.load(saved / CHECKPOINT, run.model, run.optimizer)
    assert progress["update"] == 10
    before = state(run)
    other = Run(Config.read(saved / "config.json"), saved)
    checkpoint.load(saved / CHECKPOINT, other.model, other.optimizer)
    torch.testing.assert_close(state(other), before, rtol=0, atol=0)
    assert all(float(value["step"]) == 10 for value in run.optimizer.state.values())


def test_load_restores_the_use_of_the_codes(saved):
    run = Run(Config.read(saved / "config.json"), saved)
    fresh = state(run)[0]
    checkpoint.load(saved / CHECKPOINT, run.model, run.optimizer)
    layer = run.model._vq_vae
    names = {f"_vq_vae.{name}" for name in ("_use", "_observed", "_num_revived")}
    assert set(state(run)[0]) - set(run.model.state_dict()) == names
    assert all((layer.get_buffer(name.removeprefix("_vq_vae.")) != fresh[name]).any() for name in names)
    assert float(rows(saved)[-1]["revived"]) == layer.usage.revived


def test_resume_is_bitwise_equal_to_whole_run(images, saved, tmp_path):
    run = Run(parse([*images, "--updates", "20"]).config, tmp_path / "whole")
    run.start()
    assert run.train()
    expected = state(run)
    resumed = Run(Config.read(saved / "config.json"), Path(shutil.copytree(saved, tmp_path / "resumed")))
    resumed.resume()
    assert resumed.train()
    torch.testing.assert_close(state(resumed), expected, rtol=0, atol=0)
    assert rows(resumed.folder)[10:] == rows(run.folder)[10:]


def test_resume_of_checkpoint_of_earlier_version_begins_the_use_anew(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)

    def drop_buffers(tensors):
        for name in [name for name in tensors if name.startswith("buffer.")]:
            del tensors[name]

    rewritten(folder, drop_buffers)
    lines = (folder / "metrics.csv").read_text().splitlines()
    earlier = [",".join([*line.split(",")[:4], line.split(",")[-1]]) for line in lines]
    (folder / "metrics.csv").write_text("\n".join(earlier) + "\n")
    run = Run(Config.read(folder / "config.json"), folder)
    run.resume()
    assert run.update == 10
    assert run.model._vq_vae.usage.revived == 0
    assert run.train()
    run.close()
    after = rows(folder)
    assert [row["utilisation"] == "nan" for row in after] == [True] * 10 + [False] * 10
    assert [row["lr"] for row in after[:10]] == [line.split(",")[-1] for line in lines[1:]]


def test_load_of_broken_files_does_not_corrupt_the_heap(saved):
    # These variables make glibc check its heap, since 2.34 by a separate library.
    checked = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}
    if MALLOC_DEBUG.exists():
        checked["LD_PRELOAD"] = str(MALLOC_DEBUG)
    words = [sys.executable, "-m", "tests.models.broken_runs", str(saved)]
    result = subprocess.run(words, cwd=ROOT, env=os.environ | checked, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-500:]
    assert len(result.stdout.splitlines()) == len(BROKEN_CHECKPOINTS) - 1
    assert "loaded" not in result.stdout


def test_checksum_of_other_names_shapes_types_bytes_or_progress_differs():
    tensor = torch.arange(6, dtype=torch.float32)
    texts = {
        checkpoint.checksum({"a": tensor}, "{}"),
        checkpoint.checksum({"b": tensor}, "{}"),
        checkpoint.checksum({"a": tensor.view(2, 3)}, "{}"),
        checkpoint.checksum({"a": tensor.view(torch.int32)}, "{}"),
        checkpoint.checksum({"a": tensor + 1}, "{}"),
        checkpoint.checksum({"a": tensor}, "{} "),
    }
    assert len(texts) == 6
    assert checkpoint.checksum({"a": tensor.clone()}, "{}") in texts


def test_resume_with_incomplete_row_after_the_checkpoint_removes_it(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    with (folder / "metrics.csv").open("a") as file:
        file.write("11,0.5,0.5,3,3,1,0,0.001\n12,0.")
    run = Run(Config.read(folder / "config.json"), folder)
    run.resume()
    assert [row["update"] for row in rows(folder)] == [str(update) for update in range(1, 11)]


def test_save_weights_creates_file_with_the_umask(saved):
    umask = os.umask(0o022)
    try:
        run = Run(Config.read(saved / "config.json"), saved)
        checkpoint.save_weights(saved / "model.safetensors", run.model)
    finally:
        os.umask(umask)
    assert (saved / "model.safetensors").stat().st_mode & 0o777 == 0o644
    (saved / "model.safetensors").unlink()

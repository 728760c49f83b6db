"""The training command in a subprocess, on small images."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models.build import build_model
from models.report.__main__ import main as report_main
from models.report.page import CAPTIONS
from models.training.config import Config, parse
from models.training.metrics import COLUMNS, Metrics
from models.training.run import Run, TrainingDiverged
from models.training.step import rate_factor

from .runs import ROOT, command, refused, rows, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_umap")]


@pytest.mark.parametrize("model", ["vqvae", "vqvae-ema", "dlvae"])
def test_train_of_each_model_learns_and_reports(model, images, tmp_path, capsys):
    run = tmp_path / "run"
    patches = ["--data", "patches", "--hiddens", 32, "--batch-size", 16, "--lr", 3e-3, "--warmup", 5]
    result = train("--model", model, "--updates", 100, "--out", run, *images, *patches)
    assert result.returncode == 0, result.stderr
    metrics = rows(run)
    assert [int(row["update"]) for row in metrics] == list(range(1, 101))
    nmse = [float(row["nmse"]) for row in metrics]
    assert np.mean(nmse[-5:]) < 0.5 * np.mean(nmse[:5])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["updates"] == 100
    assert 0 < summary["nmse"] < 1
    assert 1 <= summary["perplexity"] <= 32
    assert 0 < summary["utilisation"] <= 1
    assert (summary["revived"] is None) == (model == "dlvae")
    if model != "dlvae":
        assert summary["revived"] == float(metrics[-1]["revived"]) > 0
        assert summary["training_utilisation"] == pytest.approx(float(metrics[-1]["utilisation"]), rel=1e-5)
        assert 1 <= summary["training_perplexity"] <= 32
        assert f"revived codes          {summary['revived']:.0f}\n" in result.stdout
    assert summary["nonzero"] == pytest.approx(4 / 32 if model == "dlvae" else 1 / 32)
    assert f"{summary['nmse']:.4f}" in result.stdout
    assert list(run.glob("events.out.tfevents.*"))
    assert not list(run.glob("*.partial"))

    page = (run / "report.html").read_text()
    shown = dict(re.findall(r'<img id="(\w+)" alt="[^"]+" src="data:image/png;base64,([^"]+)">', page))
    assert set(shown) == set(CAPTIONS)
    for name, data in shown.items():
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
        assert pixels.std() > 5, name
    assert not re.search(r'(src|href)="(?!data:)', page)
    for value in (f"{summary['nmse']:.4f}", "num_embeddings", str(tmp_path.parent)[:4]):
        assert value in page

    weights = load_file(run / "model.safetensors")
    config = Config.read(run / "config.json")
    build_model(config, 3).load_state_dict(weights)

    before = (run / "summary.json").read_text()
    assert report_main([str(run)]) == 0
    assert (run / "summary.json").read_text() == before
    capsys.readouterr()
    assert "exists already" in refused(capsys, "--out", run, *images)


@pytest.fixture(scope="module")
def whole(without_umap, images, tmp_path_factory):
    """A run of 60 updates without an interrupt."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train("--updates", 60, "--out", run, *images).returncode == 0
    return run


def interrupted(images, run, number, *flags):
    """Start a run of 60 updates, send it and its children a signal after it has saved; returns the process."""
    process = subprocess.Popen(
        command("--updates", 60, "--out", run, *images, *flags),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (run / "checkpoint.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.output = process.communicate()
    return process


def assert_same_end(run, whole):
    weights, expected = (load_file(each / "model.safetensors") for each in (run, whole))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert rows(run) == rows(whole)


def test_resume_after_kill_is_bitwise_equal_to_whole_run(images, whole, tmp_path):
    run = tmp_path / "run"
    process = interrupted(images, run, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()
    result = train("--resume", run)
    assert result.returncode == 0, result.stderr
    assert_same_end(run, whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_resume_on_gpu_continues(images, tmp_path):
    run = tmp_path / "run"
    assert train(*images, "--device", "cuda", "--updates", 20, "--out", run).returncode == 0
    result = train("--resume", run, "--updates", 40)
    assert result.returncode == 0, result.stderr
    assert len(rows(run)) == 40


@pytest.mark.parametrize(("number", "loading"), [(signal.SIGINT, "resident"), (signal.SIGTERM, "streamed")])
def test_resume_after_interrupt_is_bitwise_equal_to_whole_run(number, loading, images, whole, tmp_path):
    run = tmp_path / "run"
    process = interrupted(images, run, number, "--loading", loading)
    assert process.returncode == 130, process.output
    done = int(re.search(r"interrupted after (\d+) updates; resume with: .* --resume", process.output[0])[1])
    assert len(rows(run)) == done
    assert "Traceback" not in process.output[1]
    assert train("--resume", run).returncode == 0
    assert_same_end(run, whole)


def test_resume_of_finished_run_with_more_updates_continues(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert train("--resume", run, "--updates", 70).returncode == 0
    assert len(rows(run)) == 70


def test_train_with_loss_not_finite_stops_and_keeps_last_checkpoint(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = json.loads((run / "config.json").read_text())
    # Streamed, because the workers have to end after an error as well.
    changes = {"lr": 1e35, "schedule": "constant", "loading": "streamed"}
    (run / "config.json").write_text(json.dumps(config | changes))
    before = (run / "checkpoint.safetensors").read_bytes()
    result = train("--resume", run, "--updates", 100)
    assert result.returncode == 1
    message = (
        r"error: (the loss of update \d+ is (nan|inf)|.*not finite); start a new run with a lower --lr\. Last good"
    )
    assert re.search(message, result.stderr), result.stderr
    assert all(np.isfinite(float(row["loss"])) for row in rows(run))
    assert (run / "checkpoint.safetensors").read_bytes() == before


def test_save_of_weights_not_finite_raises(images, tmp_path):
    run = Run(parse([*images, "--out", str(tmp_path / "run")]).config, tmp_path / "run")
    run.start()
    run._save()
    before = run.checkpoint_path.read_bytes()
    next(run.model.parameters()).data[0] = torch.nan
    with pytest.raises(TrainingDiverged, match="not finite"):
        run._save()
    assert run.checkpoint_path.read_bytes() == before


def test_resume_of_broken_run_ends_with_message(whole, images, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    line = refused(capsys, "--resume", run, "--updates", 20)
    assert f"error: expected updates to be at least 60, which {run} has done already, got 20" in line
    (run / "metrics.csv").unlink()
    assert Run(parse(["--resume", str(run)]).config, run).resume() is None
    (run / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    line = refused(capsys, "--resume", run)
    assert "checkpoint.safetensors is not a valid checkpoint of this run" in line
    refused(capsys, run, main=report_main)
    line = refused(capsys, *images, "--device", "nowhere", "--out", tmp_path / "other")
    assert "error: expected device to be usable on this machine, got 'nowhere'" in line
    line = refused(capsys, *images, "--device", "meta", "--out", tmp_path / "other")
    assert "error: expected device to be cpu, cuda, cuda:N or auto, got 'meta'" in line
    assert not (tmp_path / "other").exists()


def test_resume_with_full_disk_keeps_last_checkpoint(whole, images, tmp_path):
    def refuse_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    def resumed(run):
        words = command("--resume", run, "--updates", 80)
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, preexec_fn=refuse_large_files)

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = (run / "checkpoint.safetensors").read_bytes()
    result = resumed(run)
    assert result.returncode == 1
    message = (
        rf"^error: {run}/checkpoint.safetensors cannot be written \(.*\); resume with: python -m .* --resume {run}$"
    )
    assert re.search(message, result.stderr, re.MULTILINE), result.stderr
    assert "Traceback" not in result.stderr
    assert (run / "checkpoint.safetensors").read_bytes() == before
    assert not list(run.glob("*.partial"))
    (run / "checkpoint.safetensors").unlink()
    assert re.search("cannot be written .*; there is no checkpoint yet", resumed(run).stderr)
    assert train("--resume", run, "--updates", 60).returncode == 0
    assert_same_end(run, whole)


def test_cut_removes_rows_of_later_updates(tmp_path):
    lines = [",".join(COLUMNS), "1,1,1,1,1,1,0,1", "4,1,1,1,nan,nan,nan,1", "5,1,1,1,1,1,0,1", "5,1"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    Metrics(tmp_path).cut(4)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == lines[:3]


def test_train_with_invalid_data_or_size_ends_with_message(images, tmp_path, capsys):
    message = (
        f"error: expected --data folder:PATH to be a folder of images, got {ROOT / 'nowhere'}, which is not a folder"
    )
    assert refused(capsys, "--data", "folder:nowhere", "--out", tmp_path / "a") == message
    line = refused(capsys, "--model", "dlvae", *images, "--sparsity-level", 33, "--out", tmp_path / "b")
    assert "expected sparsity_level to be an integer in [1, 32], got 33" in line
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    assert report_main([str(tmp_path)]) == 1


def test_rate_factor_of_each_schedule_has_its_shape():
    config = Config(updates=100, warmup=10)
    rates = [rate_factor(config, update) for update in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == pytest.approx(rates[9], abs=0.02)
    assert rates[-1] < 1e-3
    assert {rate_factor(Config(schedule="constant"), update) for update in (0, 7)} == {1.0}


def test_train_in_bfloat16_has_finite_losses_and_float32_weights(images, tmp_path):
    config = parse([*images, "--precision", "bfloat16", "--updates", "5", "--out", str(tmp_path / "run")]).config
    run = Run(config, tmp_path / "run")
    run.start()
    run.train()
    assert all(np.isfinite(float(row["loss"])) for row in rows(tmp_path / "run"))
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_train_of_compiled_model_equals_eager_model(images, tmp_path, monkeypatch):
    # Without inductor, which compiles for a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ends = []
    for flag in ("--compile", "--no-compile"):
        run = Run(parse([*images, "--updates", "5", "--precision", "float32", flag]).config, tmp_path / flag)
        run.start()
        assert run.train()
        assert (run._step._objective._compiled_call_impl is not None) == (flag == "--compile")
        ends.append(run.model.state_dict())
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-4, atol=1e-5)


def test_train_without_tensorboard_prints_note(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = Run(parse([*images, "--updates", "3"]).config, tmp_path / "run")
    run.start()
    assert run.train()
    assert "tensorboard is not installed" in capsys.readouterr().err
    assert len(rows(run.folder)) == 3
    assert not list(run.folder.glob("events.out*"))


def test_import_without_umap_works():
    code = "import sys; sys.modules['umap'] = None; import models.train, models.report.__main__"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

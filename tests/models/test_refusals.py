"""What cannot work ends before training, in one line that names the remedy, and makes nothing on the disk."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import memory, report, train
from models.build import build_model
from models.config import Config, parse
from models.train import Run

from .runs import ROOT

INSTALL = r"install them with: pip install 'dlvae-kernels\[viz\]'"


def refused(capsys, *words, main=train.main):
    """The one line of the error."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status in (1, 2)
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("tqdm", "tqdm"),
        ("matplotlib", "matplotlib"),
        ("safetensors", "safetensors"),
        ("torchvision", "torchvision"),
        ("PIL", "pillow"),
        ("skimage", "scikit-image"),
        ("sklearn", "scikit-learn"),
    ],
)
def test_train_without_a_package_names_it_before_anything_is_made(module, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    line = refused(capsys, "--out", tmp_path / "run", "--device", "cpu", "--updates", 1)
    assert re.search(rf"packages are missing or cannot be imported: {package} \(.*\); {INSTALL}$", line)
    assert not (tmp_path / "run").exists()


def test_train_without_any_package_names_all(tmp_path):
    # In a process of its own: no module may import one of them when it is itself imported.
    hidden = ["tqdm", "matplotlib", "safetensors", "torchvision", "PIL", "skimage", "sklearn", "umap", "tensorboard"]
    code = (
        f"import sys; sys.modules |= dict.fromkeys({hidden}); from models import report, train; sys.exit(train.main())"
    )
    words = [sys.executable, "-c", code, "--out", str(tmp_path / "run"), "--device", "cpu"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    for package in ("tqdm", "matplotlib", "safetensors", "torchvision", "pillow", "scikit-image", "scikit-learn"):
        assert f"{package} (" in line
    assert not (tmp_path / "run").exists()


def test_report_without_matplotlib_names_it(images, tmp_path, monkeypatch, capsys):
    run = Run(parse([*images, "--updates", "10"]).config, tmp_path / "run")
    run.start()
    run._save()
    run.close()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused(capsys, run.folder, main=report.main)
    assert re.search(rf"matplotlib \(.*\); {INSTALL}", line)


def test_train_without_umap_says_what_the_report_will_lack(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr(Run, "train", lambda self: False)
    assert train.main([*images, "--out", str(tmp_path / "run")]) == 130
    expected = "umap-learn is not installed: the report will draw the codes by PCA; pip install 'dlvae-kernels[viz]'"
    assert expected in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--updates", "1e9"], "argument --updates: invalid int value: '1e9'"),
        (["--updates", 10**10], r"updates is 10000000000; it needs to be a whole number of at most 2147483647"),
        (["--updates", 10**30], r"updates is 10+; it needs to be a whole number of at most 2147483647"),
        (["--updates", "9" * 5000], "argument --updates: invalid int value"),
        (["--num-embeddings", 100000000000], "num_embeddings is 100000000000; .* at most 2147483647"),
        (
            ["--num-embeddings", 2_000_000_000],
            r"the model needs at least [\d,]+\.\d GiB, cpu has .*; lower num_embeddings",
        ),
        (["--hiddens", 2**31 - 1, "--embedding-dim", 2**31 - 1], "the model needs more bytes than 64 bits can count"),
        (["--residual-layers", 2_000_000], "residual_layers is 2000000; it needs to be a whole number of at most 1000"),
        (["--batch-size", 2**63], "batch_size is 9223372036854775808"),
        (["--rank-timeout", 10**18], "rank_timeout is 1000000000000000000"),
        (["--checkpoint-every", 2**70], "checkpoint_every is"),
        (["--seed", 2**64], "expected seed to be a whole number in .*, got 18446744073709551616"),
        (["--lr", "nan"], "expected lr to lie in .*, got nan"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_train_with_an_absurd_size_ends_with_one_line(words, message, images, tmp_path, capsys):
    out = tmp_path / "run"
    line = refused(capsys, *images, "--out", out, *words)
    assert re.match(f"error: {message}", line), line
    assert not out.exists()


def test_updates_of_a_billion_take_no_memory(images, tmp_path):
    # A list of a learning rate for each update would take 40 GB.
    run = Run(parse([*images, "--updates", str(10**9)]).config, tmp_path / "run")
    run.step()
    assert run._step.read(run.ranks).rows(0, 1)[0][0] > 0


@pytest.mark.parametrize("model", ["vqvae", "vqvae-ema", "dlvae"])
def test_needed_bytes_are_those_of_the_model_and_its_training(model):
    config = Config(model=model, hiddens=16, residual_hiddens=8, num_embeddings=200, embedding_dim=8)
    built = build_model(config, 3)
    parameters = sum(each.nbytes for each in built.parameters())
    buffers = sum(each.nbytes for each in built.buffers())
    assert memory.needed_bytes(config) == parameters + buffers
    assert memory.needed_bytes(config, 25) == 4 * parameters + buffers + 25 * 202 * 4


def test_present_bytes_are_at_most_the_limit_of_the_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_LIMIT_OF_GROUP", tmp_path / "memory.max")
    machine = memory.present_bytes(torch.device("cpu"))
    assert machine > 2**28
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.present_bytes(torch.device("cpu")) == machine
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.present_bytes(torch.device("cpu")) == 1_000_000


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]
)
def test_train_that_runs_out_of_memory_ends_with_one_line(error, images, tmp_path, monkeypatch, capsys):
    def fail(self):
        raise error

    monkeypatch.setattr(Run, "train", fail)
    assert train.main([*images, "--out", str(tmp_path / "run")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: out of memory \(.*\); lower --batch-size, --hiddens or --num-embeddings", line)


def test_train_with_an_error_that_is_not_of_memory_raises_it(images, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("a defect")

    monkeypatch.setattr(Run, "train", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        train.main([*images, "--out", str(tmp_path / "run")])


def test_train_into_a_file_ends_with_one_line(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file/run", tmp_path / "file/deeper/run"):
        line = refused(capsys, *images, "--out", out)
        file = tmp_path / "file"
        assert line == f"error: the folder {out} cannot be made: {file} is not a folder; choose another --out"
    assert "exists already; choose another --out" in refused(capsys, *images, "--out", tmp_path / "file")
    (tmp_path / "link").symlink_to("nowhere")
    assert "exists already; choose another --out" in refused(capsys, *images, "--out", tmp_path / "link")
    assert "choose another --out" in refused(capsys, *images, "--out", tmp_path / ("x" * 300) / "run")


def test_train_into_a_folder_that_cannot_be_written_ends_with_one_line(images, tmp_path, monkeypatch, capsys):
    run = Run(parse(images).config, tmp_path / "run")
    run.start()
    run.close()
    # As root, nothing is read-only.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused(capsys, *images, "--out", tmp_path / "a/b")
    assert line == f"error: the folder {tmp_path} is not writable; choose another --out"
    line = refused(capsys, "--resume", tmp_path / "run")
    assert (
        line == f"error: the folder {tmp_path}/run is not writable; copy the run to another folder and resume it there"
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["cifar10", "svhn", "fashion-mnist"])
def test_train_with_a_file_as_data_dir_ends_with_one_line(name, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(
        capsys, "--data", name, "--data-dir", tmp_path / "file", "--out", tmp_path / "run", "--device", "cpu"
    )
    assert re.match(
        rf"error: the folder {tmp_path}/file for downloads cannot be made \(.*\); choose another --data-dir", line
    )
    assert not (tmp_path / "run").exists()


def test_train_with_a_photograph_that_cannot_be_read_ends_with_one_line(tmp_path, monkeypatch, capsys):
    import skimage.data

    monkeypatch.setattr(skimage.data, "astronaut", lambda: Path("nowhere").read_bytes())
    line = refused(capsys, "--data", "patches", "--out", tmp_path / "run", "--device", "cpu")
    assert re.match(
        r"error: the photograph astronaut cannot be read \(FileNotFoundError: .*\); install .* again with: pip", line
    )


def test_report_on_no_run_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        assert f"{folder} holds no config.json; it needs to be" in refused(capsys, folder, main=report.main)
    assert "unrecognized arguments" in refused(capsys, tmp_path, "--nothing", main=report.main)

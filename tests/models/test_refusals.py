"""A command that cannot work ends before training with one line that names the remedy, and writes no file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import train
from models.build import build_model
from models.report.__main__ import main as report_main
from models.training import memory
from models.training.config import Config, parse
from models.training.run import Run

from .runs import ROOT, refused

INSTALL = r"install them with: pip install 'dlvae-kernels\[viz\]'"


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
def test_train_without_package_names_it_and_writes_nothing(module, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    line = refused(capsys, "--out", tmp_path / "run", "--device", "cpu", "--updates", 1)
    assert re.search(rf"packages are missing or cannot be imported: {package} \(.*\); {INSTALL}$", line)
    assert not (tmp_path / "run").exists()


def test_train_without_packages_names_all(tmp_path):
    # In its own process: no module may import one of them at its own import.
    hidden = ["tqdm", "matplotlib", "safetensors", "torchvision", "PIL", "skimage", "sklearn", "umap", "tensorboard"]
    code = f"import sys; sys.modules |= dict.fromkeys({hidden}); from models import train; sys.exit(train.main())"
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
    line = refused(capsys, run.folder, main=report_main)
    assert re.search(rf"matplotlib \(.*\); {INSTALL}", line)


def test_train_without_umap_prints_note(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr(Run, "train", lambda self: False)
    assert train.main([*images, "--out", str(tmp_path / "run")]) == 130
    expected = "umap-learn is not installed: the report will show the codes by PCA; pip install 'dlvae-kernels[viz]'"
    assert expected in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--updates", "1e9"], "argument --updates: invalid int value: '1e9'"),
        (["--updates", 10**10], r"expected updates to be an integer in \[1, 2147483647\], got 10000000000"),
        (["--updates", 10**30], r"expected updates to be an integer in \[1, 2147483647\], got 10+"),
        (["--updates", "9" * 5000], "argument --updates: invalid int value"),
        (
            ["--num-embeddings", 100000000000],
            r"expected num_embeddings to be .* in \[1, 2147483647\], got 100000000000",
        ),
        (
            ["--num-embeddings", 2_000_000_000],
            r"the model needs at least [\d,]+\.\d GiB, and cpu has .*; lower num_embeddings",
        ),
        (["--hiddens", 2**31 - 1, "--embedding-dim", 2**31 - 1], r"the model needs more than 2\^63 bytes"),
        (
            ["--residual-layers", 2_000_000],
            r"expected residual_layers to be an integer in \[0, 1000\], got 2000000",
        ),
        (["--batch-size", 2**63], "expected batch_size to be .*, got 9223372036854775808"),
        (["--rank-timeout", 10**18], "expected rank_timeout to be .*, got 1000000000000000000"),
        (["--checkpoint-every", 2**70], "expected checkpoint_every to be"),
        (["--seed", 2**64], "expected seed to be an integer in .*, got 18446744073709551616"),
        (["--lr", "nan"], "expected lr to lie in .*, got nan"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_train_with_extreme_value_ends_with_one_line(words, message, images, tmp_path, capsys):
    out = tmp_path / "run"
    line = refused(capsys, *images, "--out", out, *words)
    assert re.match(f"error: {message}", line), line
    assert not out.exists()


def test_run_of_a_billion_updates_steps(images, tmp_path):
    # A list of a learning rate for each update would take 40 GB.
    run = Run(parse([*images, "--updates", str(10**9)]).config, tmp_path / "run")
    run.step()
    assert run._step.read(run.ranks).rows(0, 1)[0][0] > 0


@pytest.mark.parametrize("model", ["vqvae", "vqvae-ema", "dlvae"])
def test_needed_bytes_equals_bytes_of_model_and_training(model):
    config = Config(model=model, hiddens=16, residual_hiddens=8, num_embeddings=200, embedding_dim=8)
    built = build_model(config, 3)
    parameters = sum(each.nbytes for each in built.parameters())
    buffers = sum(each.nbytes for each in built.buffers())
    assert memory.needed_bytes(config) == parameters + buffers
    assert memory.needed_bytes(config, 25) == 4 * parameters + buffers + 25 * 205 * 4


def test_available_bytes_with_control_group_are_at_most_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", tmp_path / "memory.max")
    machine = memory.available_bytes(torch.device("cpu"))
    assert machine > 2**28
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(torch.device("cpu")) == machine
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.available_bytes(torch.device("cpu")) == 1_000_000


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]
)
def test_train_out_of_memory_ends_with_one_line(error, images, tmp_path, monkeypatch, capsys):
    def fail(self):
        raise error

    monkeypatch.setattr(Run, "train", fail)
    assert train.main([*images, "--out", str(tmp_path / "run")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: out of memory \(.*\); lower --batch-size, --hiddens or --num-embeddings", line)


def test_train_with_another_error_raises_it(images, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("a defect")

    monkeypatch.setattr(Run, "train", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        train.main([*images, "--out", str(tmp_path / "run")])


def test_train_into_file_ends_with_one_line(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file/run", tmp_path / "file/deeper/run"):
        line = refused(capsys, *images, "--out", out)
        file = tmp_path / "file"
        assert line == f"error: the folder {out} cannot be created: {file} is not a folder; choose another --out"
    assert "exists already; choose another --out" in refused(capsys, *images, "--out", tmp_path / "file")
    (tmp_path / "link").symlink_to("nowhere")
    assert "exists already; choose another --out" in refused(capsys, *images, "--out", tmp_path / "link")
    assert "choose another --out" in refused(capsys, *images, "--out", tmp_path / ("x" * 300) / "run")


def test_train_into_read_only_folder_ends_with_one_line(images, tmp_path, monkeypatch, capsys):
    run = Run(parse(images).config, tmp_path / "run")
    run.start()
    run.close()
    # For root, no folder is read-only.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused(capsys, *images, "--out", tmp_path / "a/b")
    assert line == f"error: the folder {tmp_path} is not writable; choose another --out"
    line = refused(capsys, "--resume", tmp_path / "run")
    assert (
        line == f"error: the folder {tmp_path}/run is not writable; copy the run to another folder and resume it there"
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["cifar10", "svhn", "fashion-mnist"])
def test_train_with_file_as_data_dir_ends_with_one_line(name, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(
        capsys, "--data", name, "--data-dir", tmp_path / "file", "--out", tmp_path / "run", "--device", "cpu"
    )
    assert re.match(
        rf"error: the folder {tmp_path}/file for downloads cannot be created \(.*\); choose another --data-dir", line
    )
    assert not (tmp_path / "run").exists()


def test_train_with_unreadable_photograph_ends_with_one_line(tmp_path, monkeypatch, capsys):
    import skimage.data

    monkeypatch.setattr(skimage.data, "astronaut", lambda: Path("nowhere").read_bytes())
    line = refused(capsys, "--data", "patches", "--out", tmp_path / "run", "--device", "cpu")
    assert re.match(
        r"error: the photograph astronaut cannot be read \(FileNotFoundError: .*\); install .* again with: pip", line
    )


def test_report_on_folder_without_run_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        assert f"got {folder}, which has no config.json" in refused(capsys, folder, main=report_main)
    assert "unrecognized arguments" in refused(capsys, tmp_path, "--nothing", main=report_main)

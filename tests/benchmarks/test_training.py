"""Times of training runs, updates to a held-out error, and summaries of finished runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import __main__, ceilings, results, training
from models.training.config import parse
from models.training.data import load

CPU = torch.device("cpu")


@pytest.mark.slow
def test_updates_are_timed_with_the_notebook_loop(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ceilings, "has_products", lambda device, dtype: False)
    monkeypatch.setattr(ceilings, "product_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(ceilings, "convolution_rate", lambda device, dtype: 1e10)
    path = tmp_path / "updates.csv"
    training.measure_updates(CPU, path, updates=2, rounds=1, batch_size=4)
    rows = results.read(path)
    names = [(row["model"], row["implementation"]) for row in rows]
    assert names == [(model, name) for model in training.MODELS for name in ("dlvae_kernels", "VQ-VAE notebook")]
    for row in rows:
        rate = float(row["updates_per_second"])
        assert float(row["projected_seconds"]) == pytest.approx(200_000 / rate, rel=1e-2)
        assert float(row["limit_percent"]) == pytest.approx(float(row["gflop"]) * rate, rel=5e-2)
        assert 0 < float(row["nmse"]) < 20
    assert "updates_per_second" in capsys.readouterr().out


@pytest.mark.slow
def test_recipes_state_whether_the_error_was_reached(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    small = "--batch-size 16 --hiddens 8 --embedding-dim 8"
    monkeypatch.setattr(training, "RECIPES", {name: f"{words} {small}" for name, words in training.RECIPES.items()})
    path = tmp_path / "recipes.csv"
    words = ["recipes", "--data", "patches", "--recipe", "default", "notebook", "--most", "15", "--csv", str(path)]
    assert __main__.main([*words, "--seed", "0", "1"]) == 0
    monkeypatch.setattr(training, "TARGET", 1e3)
    assert __main__.main([*words, "--seed", "2"]) == 0
    rows = results.read(path)
    combinations = [("default", "0"), ("default", "1"), ("notebook", "0"), ("notebook", "1")]
    assert [(row["recipe"], row["seed"]) for row in rows[:4]] == combinations
    # The first evaluation is after ten updates.
    assert [(row["updates"], row["reached"]) for row in rows] == [("15", "False")] * 4 + [("10", "True")] * 2
    assert rows[0].keys() == results.read(results.FOLDER / "recipes.csv")[0].keys()


def test_recipes_differ_from_the_default_in_one_hyper_parameter():
    default = dataclasses.asdict(parse([]).config).items()
    for name, words in training.RECIPES.items():
        config = parse(words.split()).config
        if "--preset" not in words:
            assert len(dataclasses.asdict(config).items() - default) == (name != "default"), name


def test_summaries_of_runs_are_collected(tmp_path):
    (tmp_path / "summary.json").write_text('{"model": "dlvae", "nmse": 0.5}')
    path = tmp_path / "training.csv"
    results.write_training([tmp_path], path, CPU)
    (row,) = results.read(path)
    assert (row["model"], row["nmse"], row["torch"]) == ("dlvae", "0.5", torch.__version__)


def test_images_without_scikit_image_are_crops_of_photographs(monkeypatch, capsys):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(training, "_CROPS", 10)
    name = training.images.__wrapped__()
    assert "scikit-image is not installed" in capsys.readouterr().out
    assert len(load(name, results.ROOT).train) == 18

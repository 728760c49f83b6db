from __future__ import annotations

import csv
import dataclasses

import pytest

from benchmarks import __main__, recipes
from models.training.config import parse


@pytest.mark.slow
def test_a_row_says_whether_the_error_was_reached(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    small = "--batch-size 16 --hiddens 8 --embedding-dim 8"
    monkeypatch.setattr(recipes, "RECIPES", {name: f"{words} {small}" for name, words in recipes.RECIPES.items()})
    rows = tmp_path / "recipes.csv"
    words = ["recipes", "--data", "patches", "--recipe", "default", "notebook", "--most", "15", "--rows", str(rows)]
    assert __main__.main([*words, "--seed", "0", "1"]) == 0
    monkeypatch.setattr(recipes, "TARGET", 1e3)
    assert __main__.main([*words, "--seed", "2"]) == 0
    with rows.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["recipe"], row["seed"]) for row in found[:4]] == [
        ("default", "0"),
        ("default", "1"),
        ("notebook", "0"),
        ("notebook", "1"),
    ]
    # The first look is after ten updates.
    assert [(row["updates"], row["reached"]) for row in found] == [("15", "False")] * 4 + [("10", "True")] * 2


def test_recipes_differ_from_the_default_in_one_thing():
    of_default = dataclasses.asdict(parse([]).config).items()
    for name, words in recipes.RECIPES.items():
        config = parse(words.split()).config
        if "--preset" not in words:
            assert len(dataclasses.asdict(config).items() - of_default) == (name != "default"), name

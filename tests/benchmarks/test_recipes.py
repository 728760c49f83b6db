from __future__ import annotations

import csv

import pytest

from benchmarks import __main__, recipes


@pytest.mark.slow
def test_a_row_says_whether_the_error_was_reached(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr(recipes, "_SAME", {**recipes._SAME, "batch_size": 16, "hiddens": 8, "embedding_dim": 8})
    rows = tmp_path / "recipes.csv"
    words = ["recipes", "--data", "patches", "--recipe", "ours", "notebook", "--most", "15", "--rows", str(rows)]
    assert __main__.main([*words, "--seed", "0", "1"]) == 0
    monkeypatch.setattr(recipes, "TARGET", 1e3)
    assert __main__.main([*words, "--seed", "2"]) == 0
    with rows.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["recipe"], row["seed"]) for row in found[:4]] == [
        ("ours", "0"),
        ("ours", "1"),
        ("notebook", "0"),
        ("notebook", "1"),
    ]
    # The first look is after ten updates.
    assert [(row["updates"], row["reached"]) for row in found] == [("15", "False")] * 4 + [("10", "True")] * 2


def test_recipes_differ_from_ours_in_what_they_name():
    for name, recipe in recipes.RECIPES.items():
        if name.startswith("ours, "):
            assert len(recipe.items() - recipes.RECIPES["ours"].items()) == 1

"""How many updates a recipe takes to a given held-out error: `python -m benchmarks recipes`.

The network, the batch of 256 images and the arithmetic are the same for all; a recipe says how the codebook begins,
whether unused codes are drawn anew, how fast all of it learns, and by what.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from models.config import parse
from models.evaluate import evaluate
from models.train import Run

from . import results

TARGET = 0.05  # NMSE
_HELD_OUT = 500  # images, of those held out
# Between two looks at the held-out images: at least so many updates, and this share of those so far.
_LOOK_EVERY, _LOOK_SHARE = 10, 0.05

# What differs from the preset of the notebook in all runs.
_SAME: dict[str, Any] = {"precision": "auto", "channels_last": True}
_OURS: dict[str, Any] = {"lr": 1e-3, "init": "data", "dead_code_threshold": 1.0, "decay": 0.9}

RECIPES: dict[str, dict[str, Any]] = {
    "notebook": {},
    "notebook, lr 1e-3": {"lr": 1e-3},
    "ours": _OURS,
    "ours, decay 0.99": {**_OURS, "decay": 0.99},
    "ours, decay 0.8": {**_OURS, "decay": 0.8},
    "ours, lr 2e-3": {**_OURS, "lr": 2e-3},
    "ours, lr 5e-4": {**_OURS, "lr": 5e-4},
    "ours, init normal": {**_OURS, "init": "normal"},
    "ours, no revival": {**_OURS, "dead_code_threshold": 0.0},
    "ours, revival below 0.1": {**_OURS, "dead_code_threshold": 0.1},
    "ours, by gradient": {**_OURS, "model": "vqvae"},
    "ours, embedding_dim 64": {**_OURS, "embedding_dim": 64},
}
_COLUMNS = (
    "recipe",
    "data",
    "seed",
    "updates",
    "reached",
    "nmse",
    "perplexity",
    "seconds",
    "device",
    "torch",
    "commit",
)


def updates_to_target(recipe: str, data: str, seed: int, most: int) -> dict[str, Any]:
    """Train until the held-out error is at most TARGET, or for `most` updates: a row."""
    notebook = parse(["--preset", "notebook"]).config
    options = {"data": data, "seed": seed, "updates": most, **_SAME, **RECIPES[recipe]}
    run = Run(dataclasses.replace(notebook, **options), Path("unwritten"))
    held_out = run.images.held_out[:_HELD_OUT]
    begin = time.perf_counter()
    while True:
        run.model.train()
        for _ in range(min(max(_LOOK_EVERY, int(_LOOK_SHARE * run.update)), most - run.update)):
            run.step()
        found = evaluate(run.model, held_out, run.variance, run.device)
        if found.nmse <= TARGET or run.update >= most:
            break
    return {
        "recipe": recipe,
        "data": data,
        "seed": seed,
        "updates": run.update,
        "reached": found.nmse <= TARGET,
        "nmse": round(found.nmse, 4),
        "perplexity": round(found.perplexity, 1),
        "seconds": round(time.perf_counter() - begin, 1),
        "device": results.device_name(run.device),
        "torch": torch.__version__,
        "commit": results.commit(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--data", nargs="+", default=["patches", "fashion-mnist"])
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--most", type=int, default=2000, help="updates after which a run is given up")
    parser.add_argument("--rows", type=Path, default=results.FOLDER / "recipes.csv", help="file that rows are added to")


def main(arguments: argparse.Namespace) -> int:
    is_new = not arguments.rows.exists()
    with arguments.rows.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for data, recipe, seed in itertools.product(arguments.data, arguments.recipe, arguments.seed):
            row = updates_to_target(recipe, data, seed, arguments.most)
            writer.writerow(row)
            file.flush()
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return 0

"""How many updates a recipe takes to a given held-out error: `python -m benchmarks recipes`.

A recipe is what `python -m models.train` is given: by its defaults or the notebook's preset, and what it names. Batches
of 256 images, the arithmetic and the layout are the same for all.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from pathlib import Path
from typing import Any

from models.report.evaluate import evaluate
from models.training.config import parse
from models.training.run import Run

from . import results

TARGET = 0.05  # NMSE
_HELD_OUT = 500  # images, of those held out
# Between two looks at the held-out images: at least so many updates, and this share of those so far.
_LOOK_EVERY, _LOOK_SHARE = 10, 0.05

_SAME = ["--batch-size", "256", "--precision", "auto", "--channels-last"]
RECIPES = {
    "default": "",
    "notebook": "--preset notebook",
    "notebook, lr 1e-3": "--preset notebook --lr 1e-3",
    "init data": "--init data",
    "no revival": "--dead-code-threshold 0",
    "revival below 0.1": "--dead-code-threshold 0.1",
    "lr 1e-3": "--lr 1e-3",
    "lr 4e-3": "--lr 4e-3",
    "constant lr": "--schedule constant",
    "decay 0.8": "--decay 0.8",
    "decay 0.9": "--decay 0.9",
    "decay 0.99": "--decay 0.99",
    "by gradient": "--model vqvae",
    "embedding_dim 256": "--embedding-dim 256",
}
# Updates: at which the error was reached, or all. Most: when it would have been given up; a schedule ends there.
_COLUMNS = (
    *("recipe", "data", "seed", "updates", "most", "reached", "nmse", "perplexity", "seconds"),
    *("device", "threads", "torch", "commit"),
)


def updates_to_target(recipe: str, data: str, seed: int, most: int) -> dict[str, Any]:
    """Train until the held-out error is at most TARGET, or for `most` updates: a row."""
    words = ["--data", data, "--seed", str(seed), "--updates", str(most), *_SAME, *RECIPES[recipe].split()]
    run = Run(parse(words).config, Path("unwritten"))
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
        "most": most,
        "reached": found.nmse <= TARGET,
        "nmse": round(found.nmse, 4),
        "perplexity": round(found.perplexity, 1),
        "seconds": round(time.perf_counter() - begin, 1),
        **results.environment(run.device),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--data", nargs="+", default=["patches", "fashion-mnist"])
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--most", type=int, default=1000, help="updates after which a run is given up")
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

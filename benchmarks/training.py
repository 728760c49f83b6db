"""Training, compared with the training loop of the VQ-VAE notebook: steps, whole runs, and updates to a given error.

The entries time single steps. `python -m benchmarks updates` times whole runs. `python -m benchmarks recipes` counts
the updates that a recipe needs to reach a held-out error.

Functions import models/ when they run: `verify` imports this file in trees whose models/ may differ.
"""

from __future__ import annotations

import atexit
import csv
import importlib.util
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

from . import ceilings, judge, results, sizes
from .calls import Call, Tensors, needs
from .entry import LIBRARY, Entry, Implementation, Tolerance, Verdict
from .inputs import Inputs, Size
from .layers import DICTIONARY_LEARNING, NOTEBOOK, VECTOR_QUANTIZER_EMA
from .results import Row

if TYPE_CHECKING:
    from models.training.run import Run

# Updates that compile, select algorithms and, on a GPU, capture a CUDA graph.
_WARM_UP = 5
_POSITIONS = 64  # of the latents of an image of 32 x 32
_CROPS = 2000  # of each photograph


@lru_cache
def images() -> str:
    """The name of the training images: patches, or without scikit-image crops of scikit-learn's two photographs."""
    if importlib.util.find_spec("skimage"):
        return "patches"
    from sklearn.datasets import load_sample_image
    from torchvision.transforms.functional import crop, to_pil_image

    folder = Path(tempfile.mkdtemp(prefix="dlvae-crops-"))
    atexit.register(shutil.rmtree, folder)
    generator = torch.Generator().manual_seed(0)
    for name in ("china.jpg", "flower.jpg"):
        photograph = to_pil_image(load_sample_image(name))
        for i in range(_CROPS):
            left, top = (int(torch.randint(size - 32, (), generator=generator)) for size in photograph.size)
            crop(photograph, top, left, 32, 32).save(folder / f"{name}-{i}.png")
    print(f"scikit-image is not installed: training runs use {2 * _CROPS} crops of scikit-learn's photographs")
    return f"folder:{folder}"


def _run(flags: dict[str, Any], words: list[str], folder: Path = Path("unwritten")) -> Run:
    """A run with flags of `python -m models.train`. It writes to its folder only after `start`."""
    from models.training.config import parse
    from models.training.run import Run

    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return Run(parse([*given, *words]).config, folder)


def _notebook_run(model: str, flags: dict[str, Any], folder: Path = Path("unwritten")) -> Run:
    """A run with the hyper-parameters of the VQ-VAE notebook."""
    preset = {"preset": "notebook", "model": model, "data": images()}
    return _run(preset | flags, ["--channels-last"], folder)


# --- entries: one training step ---


def _step_run(model: str, inputs: Inputs, precision: str = "float32") -> Run:
    size = inputs.size
    flags: dict[str, Any] = {"batch-size": size.n // _POSITIONS, "embedding-dim": size.d, "num-embeddings": size.k}
    flags |= {"sparsity-level": size.selected, "precision": precision, "device": inputs.x.device}
    return _notebook_run(model, flags)


def _library_step(model: str, precision: str, inputs: Inputs) -> Call:
    if precision == "bfloat16":
        needs("cuda", inputs)
    run = _step_run(model, inputs, precision)
    loss = _loss(run.model, run.batches[0], run.variance)
    for _ in range(_WARM_UP):
        run.step()
    return Call(run.step, answer=lambda out: (loss,))


def _notebook_step(model: str, inputs: Inputs) -> Call:
    from tests.oracles import notebook_training

    run = _step_run(model, inputs)
    loss = _loss(notebook_training.Model(run.model, run.config), run.batches[0], run.variance)
    step, _ = notebook_training.training_loop(run)
    return Call(step, answer=lambda out: (loss,))


def _loss(model: nn.Module, images: Tensor, variance: float) -> Tensor:
    """The loss of the first batch before any update, by which a step is judged."""
    model.eval()
    with torch.no_grad():
        loss, reconstruction, _ = model(images)
    model.train()
    return mse_loss(reconstruction, images) / variance + loss


def _judge_step(model: str, inputs: Inputs, answer: Tensors, gradients: object, tolerance: Tolerance) -> Verdict:
    run = _step_run(model, inputs)
    return judge.close((_loss(run.model.double(), run.batches[0].double(), run.variance),), answer, tolerance)


def _entry(model: str, ops: tuple[str, ...], size: Size) -> Entry:
    return Entry(
        f"train {model}",
        "tests/models/test_train.py",
        ops,
        {"cpu": (size,), "cuda": (size,)},
        (
            Implementation(LIBRARY, partial(_library_step, model, "float32")),
            Implementation(f"{LIBRARY}, autocast", partial(_library_step, model, "bfloat16"), precision="bfloat16"),
            Implementation(NOTEBOOK, partial(_notebook_step, model)),
        ),
        partial(_judge_step, model),
    )


MODELS = ("vqvae-ema", "dlvae")
TRAINING = (
    _entry("vqvae-ema", VECTOR_QUANTIZER_EMA.ops, sizes.CIFAR),
    _entry("dlvae", DICTIONARY_LEARNING.ops, sizes.DICTIONARY),
)


# --- updates: time of whole runs, projected to all updates of the notebook ---

# The loop of the notebook is slow, and its updates take equal times.
_MAX_NOTEBOOK_UPDATES = 200
# The NMSE of a run is the mean of its last batches, because errors of single batches vary.
_LAST_BATCHES = 10


def measure_updates(
    device: torch.device, path: Path, updates: int, rounds: int, batch_size: int = 256, models: tuple[str, ...] = MODELS
) -> None:
    """Time `updates` updates of each model in each of `rounds` rounds, in turns, and write the rows to a CSV file.

    A run of this library is the whole of `models.train`, with its start, its metrics and its checkpoints.
    """
    names = ["float32"] + ["bfloat16"] * ceilings.has_products(device, torch.bfloat16)
    limits = {name: _rate(device, getattr(torch, name)) for name in names}
    rows: list[Row] = []
    for model in models:
        flags = {"device": device, "batch-size": batch_size, "checkpoint-every": 2000}
        new = results.completed(_update_rows(model, flags, updates, rounds, limits), device)
        rows += new
        with results.writing(path, rows[0]) as add:
            add(rows)
        print(*map(_described, new), sep="\n", flush=True)


def _update_rows(
    model: str, flags: dict[str, Any], updates: int, rounds: int, limits: dict[str, float]
) -> Iterator[Row]:
    from models.training.config import parse

    # By implementation and precision: the function that makes and times a number of updates, and the number.
    runs = {(LIBRARY, name): (_time_library, updates) for name in limits}
    runs[NOTEBOOK, "float32"] = _time_notebook, min(updates, _MAX_NOTEBOOK_UPDATES)

    def timed(key: tuple[str, str], count: int) -> tuple[float, float]:
        return runs[key][0](model, {**flags, "precision": key[1], "updates": count})

    for key in runs:
        timed(key, _WARM_UP)
    in_rounds = [{key: timed(key, count) for key, (_, count) in runs.items()} for _ in range(rounds)]
    flops = _update_flops(model, flags)
    seconds = {key: statistics.median(each[key][0] for each in in_rounds) for key in runs}
    for key, (_, count) in runs.items():
        yield {
            "model": model,
            "implementation": key[0],
            "precision": key[1],
            "updates": count,
            "rounds": rounds,
            "updates_per_second": f"{1 / seconds[key]:.4g}",
            "ms": f"{seconds[key] * 1e3:.4g}",
            "projected_seconds": f"{seconds[key] * parse(['--preset', 'notebook']).config.updates:.5g}",
            "ratio": f"{seconds[key] / seconds[LIBRARY, 'float32']:.3f}",
            "gflop": f"{flops / 1e9:.1f}",
            "limit_percent": f"{100 * flops / seconds[key] / limits[key[1]]:.3g}",
            "nmse": f"{statistics.mean(each[key][1] for each in in_rounds):.4g}",
        }


def _described(row: Row) -> str:
    """A row formatted for the terminal."""
    return ", ".join(f"{key} {value}" for key, value in row.items())


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of torch in operations a second. Products and convolutions may use different libraries."""
    with torch.no_grad():
        return max(ceilings.product_rate(device, dtype), ceilings.convolution_rate(device, dtype))


def _time_library(model: str, flags: dict[str, Any]) -> tuple[float, float]:
    """Seconds of an update, and NMSE."""
    with tempfile.TemporaryDirectory() as folder:
        run = _notebook_run(model, flags, Path(folder) / "run")
        run.start()
        run.train()
        errors = [float(row.split(",")[1]) for row in (run.folder / "metrics.csv").read_text().splitlines()[1:]]
    return run.seconds / flags["updates"], statistics.mean(errors[-_LAST_BATCHES:])


def _time_notebook(model: str, flags: dict[str, Any]) -> tuple[float, float]:
    """Seconds of an update, and NMSE."""
    from tests.oracles import notebook_training

    update, errors = notebook_training.training_loop(_notebook_run(model, flags))
    begin = time.perf_counter()
    for _ in range(flags["updates"]):
        # Each update waits for its error, so the device is finished when the loop ends.
        update()
    return (time.perf_counter() - begin) / flags["updates"], statistics.mean(errors[-_LAST_BATCHES:])


def _update_flops(model: str, flags: dict[str, Any]) -> float:
    """Operations of the products and convolutions of an update, forward and backward, in the notebook's formulas."""
    from tests.oracles import notebook_training

    run = _notebook_run(model, flags)
    network = notebook_training.Model(run.model, run.config)
    with FlopCounterMode(display=False) as counter:
        loss, reconstruction, _ = network(run.batches[0])
        (loss + reconstruction.square().mean()).backward()
    return counter.get_total_flops()


# --- recipes: updates until the held-out error is at most TARGET ---

TARGET = 0.05  # NMSE
_HELD_OUT = 500  # images
# Updates between two evaluations: at least this many, and at least this fraction of the updates so far.
_EVALUATE_EVERY, _EVALUATE_FRACTION = 10, 0.05
# The flags of each recipe, in addition to batches of 256 images in the same arithmetic and layout.
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


def updates_to_target(recipe: str, data: str, seed: int, most: int) -> Row:
    """Train until the held-out error is at most TARGET, or for `most` updates, and return the row.

    `most` is also the length of the learning rate schedule.
    """
    from models.report.evaluate import evaluate

    flags = {"data": data, "seed": seed, "updates": most, "batch-size": 256, "precision": "auto"}
    run = _run(flags, ["--channels-last", *RECIPES[recipe].split()])
    held_out = run.images.held_out[:_HELD_OUT]
    begin = time.perf_counter()
    while True:
        run.model.train()
        for _ in range(min(max(_EVALUATE_EVERY, int(_EVALUATE_FRACTION * run.update)), most - run.update)):
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


def measure_recipes(recipes: list[str], data: list[str], seeds: list[int], most: int, path: Path) -> None:
    """Append a row for each combination of recipe, data and seed to a CSV file."""
    for each, recipe, seed in itertools.product(data, recipes, seeds):
        row = updates_to_target(recipe, each, seed, most)
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        print(_described(row), flush=True)

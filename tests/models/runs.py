"""Training as a user starts it, with small models."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
SMALL = ["--hiddens", "16", "--residual-hiddens", "8", "--num-embeddings", "32", "--embedding-dim", "8"]
SMALL += ["--sparsity-level", "4", "--batch-size", "8", "--checkpoint-every", "10", "--device", "cpu"]


def write_images(folder, count):
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BILINEAR).save(folder / f"{i}.png")


def command(*flags, ranks=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *torchrun, "-m", "models.train", *map(str, flags)]


def train(*flags, ranks=1):
    return subprocess.run(command(*flags, ranks=ranks), cwd=ROOT, capture_output=True, text=True)


def end_rank():
    """End a process of several at once, without an error.

    While Python takes itself down, a thread of gloo that still lets go of a tensor aborts it.
    """
    os._exit(0)


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))

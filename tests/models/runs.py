"""Commands that train small models, and the ranks of tests."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image

from models.train import main as train_main
from models.training.ranks import end_process, join, leave

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


def refused(capsys, *words, main=train_main):
    """The error of a command in this process, which has to be one line."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status in (1, 2)
    assert line.startswith("error: ")
    return line


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def spawn(work, *args, ranks=2, on_each_machine=2, timeout=50):
    """Run work(ranks, *args) in processes that are joined over gloo."""
    mp.spawn(_work_as_rank, (free_port(), ranks, on_each_machine, timeout, work, args), nprocs=ranks)


def _work_as_rank(rank, port, count, on_each_machine, timeout, work, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % on_each_machine), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = join(torch.device("cpu"), timeout)
    work(ranks, *args)
    leave(ranks)
    end_process(0)


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))

"""How evenly a codebook with moving averages is used in training, by the rule that revives dead codes.

Each run trains the VQ-VAE of models/ with a quantizer that has the constructor arguments of the VQ-VAE notebooks
(init="normal", decay 0.99) and nothing else, but for the rule. Rows:

- perplexity, dead_percent, nmse: on held-out images at the end. dead_percent: codes that no token is assigned to.
- revived_percent, most_revived_percent: codes that a step revives, mean and maximum over all steps.
- churn_percent: held-out tokens that one step assigns to another code, mean over the last steps.

Functions import models/ when they run, as in training.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dlvae_kernels as dlvae

from . import baselines, results
from .results import Row
from .training import _run

PATH = results.FOLDER / "collapse-cpu.csv"
_DIM, _DECAY = 64, 0.99
_CHURN_STEPS = 20
_HELD_OUT = 500  # images
_LIBRARY = "dlvae_kernels"
_VQP = "vector-quantize-pytorch"


class Study(NamedTuple):
    """Runs with a codebook of one size on batches of one size, for some rules, image sets and seeds."""

    num_codes: int
    images: int  # in a batch; each gives 64 vectors
    updates: int
    rules: dict[str, Any]  # the dead_code_threshold by name, or None for the defaults of vector-quantize-pytorch
    data: tuple[str, ...] = ("patches", "fashion-mnist")
    seeds: tuple[int, ...] = (0, 1, 2)


STUDIES = {
    "notebook": Study(256, 32, 200, {"auto": "auto", "0": 0.0, "1.0": 1.0, _VQP: None}),
    "large": Study(
        4096, 16, 600, {"auto": "auto", "0": 0.0, "0.01": 0.01, "0.05": 0.05, "0.2": 0.2, "1.0": 1.0, _VQP: None},
        data=("patches",),
        seeds=(0,),
    ),
}  # fmt: skip


class _Baseline(nn.Module):
    """VectorQuantize of vector-quantize-pytorch with its defaults, with the interface of `VectorQuantizerEMA`."""

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        layer = baselines.library("vector_quantize_pytorch").VectorQuantize
        self.layer = layer(dim, num_codes, commitment_weight=0.25, accept_image_fmap=True)

    @property
    def codebook(self) -> Tensor:
        return self.layer.codebook

    def encode(self, latents: Tensor) -> Tensor:
        return self.layer(latents)[1]

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.layer(latents)
        return loss, quantized, loss.detach(), indices


def _quantizer(num_codes: int, threshold: Any) -> Any:
    if threshold is None:
        return _Baseline(num_codes, _DIM)
    return dlvae.VectorQuantizerEMA(num_codes, _DIM, 0.25, _DECAY, encodings="indices", dead_code_threshold=threshold)


def _trained(study: Study, data: str, rule: str, seed: int) -> Row:
    """Train once and return the row."""
    from models.report.evaluate import evaluate

    threshold = study.rules[rule]
    flags = {"data": data, "seed": seed, "updates": study.updates, "batch-size": study.images, "precision": "float32"}
    flags |= {"num-embeddings": study.num_codes, "embedding-dim": _DIM, "hiddens": 64, "decay": _DECAY, "device": "cpu"}
    run = _run(flags, [])
    quantizer = _quantizer(study.num_codes, threshold)
    run.model._vq_vae = quantizer
    held_out = run.images.held_out[:_HELD_OUT]
    revived: list[int] = [0]
    tokens: list[Tensor] = []
    begin = time.perf_counter()
    for step in range(study.updates):
        run.step()
        if threshold is not None:
            revived.append(int(quantizer.usage.revived))
        if step >= study.updates - _CHURN_STEPS - 1:
            tokens.append(_tokens(run.model, quantizer, held_out))
    seconds = time.perf_counter() - begin
    in_step = [100 * (after - before) / study.num_codes for before, after in pairwise(revived)]
    churn = [100 * float((after != before).double().mean()) for before, after in pairwise(tokens)]
    found = evaluate(run.model, held_out, run.variance, run.device)
    return {
        "data": data,
        "num_codes": study.num_codes,
        "vectors": study.images * 64,
        "implementation": _VQP if threshold is None else _LIBRARY,
        "rule": "defaults" if threshold is None else rule,
        "seed": seed,
        "updates": study.updates,
        "perplexity": f"{found.perplexity:.1f}",
        "dead_percent": f"{100 * (1 - found.utilisation):.1f}",
        "revived_percent": f"{statistics.mean(in_step):.2f}" if in_step else "",
        "most_revived_percent": f"{max(in_step):.2f}" if in_step else "",
        "churn_percent": f"{statistics.mean(churn):.2f}",
        "nmse": f"{found.nmse:.4f}",
        "seconds": f"{seconds:.1f}",
        **results.environment(run.device),
    }


@torch.no_grad()
def _tokens(model: Any, quantizer: Any, images: Tensor) -> Tensor:
    """The indices of all positions of uint8 images."""
    model.eval()
    parts = [quantizer.encode(model.encode(part.float() / 255)) for part in images.split(250)]
    model.train()
    return torch.cat(parts)


def _rows(names: list[str]) -> Iterator[Row]:
    for study in map(STUDIES.__getitem__, names):
        for data in study.data:
            for rule in study.rules:
                for seed in study.seeds:
                    row = _trained(study, data, rule, seed)
                    print(", ".join(f"{key} {value}" for key, value in list(row.items())[:-4]), flush=True)
                    yield row


def write(names: list[str], path: Path) -> None:
    """Run the studies and write their rows to a CSV file."""
    rows = _rows(names)
    first = next(rows)
    with results.writing(path, first) as add:
        add([first])
        for row in rows:
            add([row])

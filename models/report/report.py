"""The report on a run: summary.json, plots and report.html."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..autoencoder import Autoencoder
from ..build import build_model
from ..training import checkpoint, packages
from ..training.config import Config
from ..training.data import ImageSet, load
from ..training.files import write_together
from ..training.memory import check_memory
from ..training.metrics import COLUMNS, Metrics
from . import plots
from .evaluate import Evaluation, evaluate
from .page import html_page, readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_IMAGES = 32


def write(folder: Path, device: torch.device, images: ImageSet | None = None) -> dict[str, Any]:
    """Write summary.json, the plots and report.html into the folder of a run; print and return the summary.

    All files are replaced together at the end: after an error those of an earlier report are unchanged.

    Raises:
        SetupError: the images of the run cannot be loaded.
        ValueError: the folder is not that of a run with a checkpoint, or packages are missing.
        OSError: a file cannot be written.
    """
    for name in ("config.json", "checkpoint.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"expected the folder of a run with a checkpoint, got {folder}, which has no {name}")
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is not writable; copy the run to another folder and report on it there")
    config = Config.read(folder / "config.json")
    packages.require(config.data, trains=False)
    check_memory(config, device)
    images = images or load(config.data, Path(config.data_dir))
    model = build_model(config, images.train.shape[1]).to(device)
    progress = checkpoint.load_weights(folder / "checkpoint.safetensors", model)
    rows = Metrics(folder).rows(progress["update"])
    metrics = dict(zip(COLUMNS, np.array(rows, dtype=float).reshape(-1, len(COLUMNS)).T, strict=True))
    evaluation = evaluate(model, images.held_out, images.train_variance(), device)
    summary = {
        "model": config.model,
        "data": config.data,
        "updates": progress["update"],
        **{name: value for name, value in dataclasses.asdict(evaluation).items() if name != "counts"},
        "training_perplexity": _last(metrics["usage_perplexity"]),
        "training_utilisation": _last(metrics["utilisation"]),
        "revived": _last(metrics["revived"]),
        "num_embeddings": config.num_embeddings,
        "training_seconds": round(progress["seconds"], 1),
    }
    figures = _draw(metrics, model, images, evaluation, device, config.seed)
    pngs = {name: _png(figure) for name, figure in figures.items()}
    contents: dict[Path, str | bytes] = {folder / f"{name}.png": data for name, data in pngs.items()}
    contents[folder / "summary.json"] = json.dumps(summary, indent=2) + "\n"
    contents[folder / "report.html"] = html_page(config, summary, images.attribution, pngs)
    write_together(contents)
    _print(summary, folder)
    return summary


def _last(values: np.ndarray) -> float | None:
    """The value after the last update, or None if it is not available."""
    return None if len(values) == 0 or np.isnan(values[-1]) else float(values[-1])


@torch.no_grad()
def _draw(
    metrics: dict[str, np.ndarray],
    model: Autoencoder,
    images: ImageSet,
    evaluation: Evaluation,
    device: torch.device,
    seed: int,
) -> dict[str, Figure]:
    originals = images.held_out[:_NUM_IMAGES].to(device).float() / 255
    encoded = model.encode(originals)
    latents = model.code(encoded).latents
    masks = plots.masks(len(originals), *latents.shape[2:])
    maps = plots.principal_maps(latents.cpu())
    masked = model.decode(latents * masks.to(device))
    return {
        "nmse": plots.training_error(metrics["nmse"], evaluation.nmse),
        "usage": plots.codebook_usage(metrics, len(model.codes)),
        "reconstructions": plots.side_by_side(originals, model.decode(latents)),
        "latent_maps": plots.image_grid(maps, "Latent maps"),
        "masks": plots.image_grid(masks, "Masks"),
        "masked_latents": plots.image_grid(maps * masks, "Masked latent maps"),
        "masked_reconstructions": plots.image_grid(masked, "Reconstructions of the masked latents"),
        "umap": plots.code_map(model.codes.detach().cpu(), evaluation.counts, seed),
        "utilisation": plots.assignment_counts(evaluation.counts),
        "explained_variance": plots.explained_variance(
            {"encoder output": encoded.cpu(), "decoder input": latents.cpu()}
        ),
    }


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _print(summary: dict[str, Any], folder: Path) -> None:
    print(f"\n{summary['model']} on {summary['data']}")
    for name, value in readable(summary).items():
        print(f"  {name:22} {value}")
    print(f"  {'report':22} {folder / 'report.html'}")

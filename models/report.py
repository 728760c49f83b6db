"""Figures and pictures of a run: `python -m models.report RUN`."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import checkpoint, packages, pictures
from .autoencoder import Autoencoder
from .build import build_model, pick_device
from .config import Config, Parser
from .data import DataError, ImageSet, load
from .evaluate import Evaluation, evaluate
from .files import write_together
from .memory import check_memory
from .metrics import COLUMNS, Metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 32

_CAPTIONS = {
    "nmse": "Training error of each update, normalised by the variance of the training pixels.",
    "reconstructions": "Held-out images and what the model makes of them.",
    "latent_maps": "What the decoder sees, on its three main directions as red, green and blue.",
    "masks": "One position of each latent map is taken away.",
    "masked_latents": "The latent maps under the masks.",
    "masked_reconstructions": "What the decoder makes of the masked latents.",
    "umap": "The codebook or dictionary in the plane, coloured by use.",
    "use": "How often each code or atom was taken on the held-out images.",
    "pca_spectrum": "How many directions the latents fill, before and after the bottleneck.",
}


def write(folder: Path, device: torch.device, images: ImageSet | None = None) -> dict[str, Any]:
    """Write summary.json, the pictures and report.html into the folder of a run, and print the summary.

    The files are written after all are made, each whole: after an error those of an earlier report are as they were.

    Raises:
        DataError: the images of the run cannot be had.
        ValueError: the folder holds no whole run, or packages are missing.
        OSError: a file cannot be written.
    """
    for name in ("config.json", "checkpoint.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; it needs to be the folder of a run that has saved")
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is not writable; copy the run to another folder and report on it there")
    config = Config.read(folder / "config.json")
    packages.require(config.data, trains=False)
    check_memory(config, device)
    images = images or load(config.data, Path(config.data_dir))
    model = build_model(config, images.train.shape[1]).to(device)
    progress = checkpoint.load_weights(folder / "checkpoint.safetensors", model)
    rows = Metrics(folder).rows(progress["update"])
    training_error = np.array([float(row[COLUMNS.index("nmse")]) for row in rows])
    evaluation = evaluate(model, images.held_out, images.train_variance(), device)
    summary = {
        "model": config.model,
        "data": config.data,
        "updates": progress["update"],
        **{name: value for name, value in dataclasses.asdict(evaluation).items() if name != "use"},
        "num_embeddings": config.num_embeddings,
        "training_seconds": round(progress["seconds"], 1),
    }
    figures = _draw(training_error, model, images, evaluation, device, config.seed)
    drawn = {name: _png(figure) for name, figure in figures.items()}
    contents: dict[Path, str | bytes] = {folder / f"{name}.png": data for name, data in drawn.items()}
    contents[folder / "summary.json"] = json.dumps(summary, indent=2) + "\n"
    contents[folder / "report.html"] = _page(config, summary, images.attribution, drawn)
    write_together(contents)
    _print(summary, folder)
    return summary


@torch.no_grad()
def _draw(
    training_error: np.ndarray,
    model: Autoencoder,
    images: ImageSet,
    evaluation: Evaluation,
    device: torch.device,
    seed: int,
) -> dict[str, Figure]:
    originals = images.held_out[:_SHOWN].to(device).float() / 255
    encoded = model.encode(originals)
    latents = model.code(encoded).latents
    masks = pictures.masks(len(originals), *latents.shape[2:])
    maps = pictures.pca_maps(latents.cpu())
    return {
        "nmse": pictures.smoothed_error(training_error, evaluation.nmse),
        "reconstructions": pictures.side_by_side(originals, model.decode(latents)),
        "latent_maps": pictures.images(maps, "Latent maps"),
        "masks": pictures.images(masks, "Masks"),
        "masked_latents": pictures.images(maps * masks, "Masked latent maps"),
        "masked_reconstructions": pictures.images(
            model.decode(latents * masks.to(device)), "Reconstructions of the masked latents"
        ),
        "umap": pictures.embedding(model.codes.detach().cpu(), evaluation.use, seed),
        "use": pictures.use_histogram(evaluation.use),
        "pca_spectrum": pictures.pca_spectrum({"encoder": encoded.cpu(), "decoder's input": latents.cpu()}),
    }


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _page(config: Config, summary: dict[str, Any], attribution: str, drawn: dict[str, bytes]) -> str:
    title = html.escape(f"{config.model} on {config.data}")
    shown = []
    for name, png in drawn.items():
        data = base64.b64encode(png).decode()
        caption = html.escape(_CAPTIONS[name])
        shown.append(
            f'<figure><img id="{name}" alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: 0.15rem 1rem 0.15rem 0; text-align: left; border-bottom: 1px solid #ddd; font-weight: normal; }}
td {{ font-variant-numeric: tabular-nums; }}
figure {{ margin: 2rem 0; }}
img {{ max-width: 100%; }}
figcaption {{ color: #666; }}
</style>
</head>
<body>
<h1>{title}</h1>
{_table(dict(_readable(summary)))}
{"".join(shown)}
<h2>Configuration</h2>
{_table(dataclasses.asdict(config))}
<p>Images: {html.escape(attribution)}.</p>
</body>
</html>
"""


def _table(values: dict[str, Any]) -> str:
    rows = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _readable(summary: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("updates", f"{summary['updates']}"),
        ("held-out NMSE", f"{summary['nmse']:.4f}"),
        ("held-out PSNR", f"{summary['psnr']:.2f} dB"),
        ("held-out perplexity", f"{summary['perplexity']:.1f} of {summary['num_embeddings']}"),
        ("codes in use", f"{summary['in_use']:.1%}"),
        ("non-zero coefficients", f"{summary['nonzero']:.3%}"),
        ("training time", f"{summary['training_seconds']:.1f} s"),
    ]


def _print(summary: dict[str, Any], folder: Path) -> None:
    print(f"\n{summary['model']} on {summary['data']}")
    for name, value in _readable(summary):
        print(f"  {name:22} {value}")
    print(f"  {'report':22} {folder / 'report.html'}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m models.report", description="Report on a run.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    options = parser.parse_args(arguments)
    try:
        write(options.run, pick_device(options.device))
    except (DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

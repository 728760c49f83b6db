"""report.html: metrics, plots and configuration on one page without external files."""

from __future__ import annotations

import base64
import dataclasses
import html
from typing import Any

from ..training.config import Config

CAPTIONS = {
    "nmse": "Mean squared error of each training batch, normalised by the variance of the training pixels (NMSE).",
    "usage": "Use of the codes in training: perplexity of each batch and of the moving averages of the counts, and"
    " utilisation, the fraction of the codes with at least a tenth of the mean count; number of revived codes.",
    "reconstructions": "Held-out images and their reconstructions.",
    "latent_maps": "Latents after the bottleneck: their first three principal components as red, green and blue.",
    "masks": "Masks that set one position of each latent map to zero.",
    "masked_latents": "The latent maps under the masks.",
    "masked_reconstructions": "Reconstructions of the masked latents.",
    "umap": "Codes or atoms in two dimensions, coloured by their number of assignments on the held-out images.",
    "utilisation": "Assignments of each code or atom on the held-out images; those without any are dead codes.",
    "explained_variance": "Explained variance of the principal components of the latents around the bottleneck.",
}


def html_page(config: Config, summary: dict[str, Any], attribution: str, pngs: dict[str, bytes]) -> str:
    title = html.escape(f"{config.model} on {config.data}")
    figures = []
    for name, png in pngs.items():
        data = base64.b64encode(png).decode()
        caption = html.escape(CAPTIONS[name])
        figures.append(
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
{_table(readable(summary))}
{"".join(figures)}
<h2>Configuration</h2>
{_table(dataclasses.asdict(config))}
<p>Images: {html.escape(attribution)}.</p>
</body>
</html>
"""


def readable(summary: dict[str, Any]) -> dict[str, str]:
    """The summary with units."""
    return {
        "updates": f"{summary['updates']}",
        "held-out NMSE": f"{summary['nmse']:.4f}",
        "held-out PSNR": f"{summary['psnr']:.2f} dB",
        "held-out perplexity": f"{summary['perplexity']:.1f} of {summary['num_embeddings']}",
        "active codes": f"{summary['utilisation']:.1%}",
        **(_usage_of_training(summary) if summary["revived"] is not None else {}),
        "non-zero coefficients": f"{summary['nonzero']:.3%}",
        "training time": f"{summary['training_seconds']:.1f} s",
    }


def _usage_of_training(summary: dict[str, Any]) -> dict[str, str]:
    return {
        "training perplexity": f"{summary['training_perplexity']:.1f} of {summary['num_embeddings']}",
        "training utilisation": f"{summary['training_utilisation']:.1%}",
        "revived codes": f"{summary['revived']:.0f}",
    }


def _table(values: dict[str, Any]) -> str:
    rows = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"

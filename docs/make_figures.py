"""Reconstruct whole photographs with a trained VQ-VAE: `python docs/make_figures.py RUN`.

RUN is the folder of a finished `python -m models.train` run. The script writes docs/images/reconstructions.png, its
numbers to docs/images/reconstructions.csv, and its caption into README.md.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.autoencoder import Autoencoder  # noqa: E402
from models.build import build_model  # noqa: E402
from models.training.checkpoint import load_weights  # noqa: E402
from models.training.config import Config  # noqa: E402

IMAGES = ROOT / "docs" / "images"
NUMBERS = IMAGES / "reconstructions.csv"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
BEGIN, END = "<!-- figure: docs/make_figures.py -->", "<!-- end of figure -->"
# The encoder halves height and width twice.
_STRIDE = 4
# Training takes its patches from the left four fifths of a photograph: see models/training/data.py.
_HELD_OUT_WIDTH = 0.2
_HEIGHT, _GAP, _MOST_BYTES = 256, 6, 400_000


def photograph(name: str) -> Tensor:
    """A photograph of scikit-image in [0, 1], cropped to multiples of the encoder's stride: [1, 3, H, W]."""
    from skimage import data

    pixels = np.array(getattr(data, name)())
    height, width = (size // _STRIDE * _STRIDE for size in pixels.shape[:2])
    return torch.from_numpy(pixels[:height, :width]).permute(2, 0, 1)[None].float() / 255


def psnr(original: Tensor, reconstruction: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, for images in [0, 1]."""
    return -10 * math.log10(float((original - reconstruction).double().square().mean()))


@torch.inference_mode()
def reconstruct(model: Autoencoder, original: Tensor) -> tuple[Tensor, float]:
    """The reconstruction of an image [1, 3, H, W], and the bits per pixel of its codes at a fixed code length."""
    coding = model.code(model.encode(original))
    bits = coding.indices.numel() * math.log2(len(model.codes)) / (original.shape[2] * original.shape[3])
    return model.decode(coding.latents).clamp(0, 1), bits


def caption(rows: list[dict[str, str]]) -> str:
    """The figure and its caption in README.md."""
    of_each = "; ".join(f"{row['photograph']} {row['psnr']} dB ({row['held_out_psnr']} dB)" for row in rows)
    first = rows[0]
    return (
        "![Three photographs, each beside its reconstruction](docs/images/reconstructions.png)\n\n"
        f"*Left: original. Right: reconstruction from {first['bits_per_pixel']} bits per pixel, by the"
        f" {first['model']} that `make train` trains in {first['updates']} updates on 32 x 32 patches. PSNR of the"
        " whole photograph, and in brackets that of its held-out rightmost fifth:"
        f" {of_each}. Photographs: scikit-image, shown smaller and in 256 colours.*"
    )


def updated(readme: str, rows: list[dict[str, str]]) -> str:
    """The text of README.md with the caption of these rows."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        raise ValueError(f"README.md holds no {BEGIN} ... {END}; add both lines where the figure belongs")
    return f"{head}{BEGIN}\n\n{caption(rows)}\n\n{END}{tail}"


def read_numbers() -> list[dict[str, str]]:
    with NUMBERS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _shown(image: Tensor) -> Image.Image:
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    width = round(image.shape[3] * _HEIGHT / image.shape[2])
    return Image.fromarray(pixels).resize((width, _HEIGHT), Image.Resampling.LANCZOS)


def _grid(pairs: list[tuple[Tensor, Tensor]]) -> bytes:
    """A PNG with a pair of images in each row."""
    shown = [(_shown(original), _shown(reconstruction)) for original, reconstruction in pairs]
    widest = max(original.width for original, _ in shown)
    size = 2 * widest + _GAP, len(shown) * (_HEIGHT + _GAP) - _GAP
    canvas = Image.new("RGB", size, "white")
    for place, (original, reconstruction) in enumerate(shown):
        top = place * (_HEIGHT + _GAP)
        canvas.paste(original, (widest - original.width, top))
        canvas.paste(reconstruction, (widest + _GAP, top))
    file = io.BytesIO()
    # A palette of 256 colours needs a third of the bytes.
    canvas.quantize(256).save(file, format="png", optimize=True)
    return file.getvalue()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("error: expected one argument, the folder of a finished run", file=sys.stderr)
        return 2
    run = Path(arguments[0])
    config = Config.read(run / "config.json")
    model = build_model(config, in_channels=3)
    progress = load_weights(run / "checkpoint.safetensors", model)
    model.eval()
    pairs, rows = [], []
    for name in PHOTOGRAPHS:
        original = photograph(name)
        reconstruction, bits = reconstruct(model, original)
        edge = round(original.shape[3] * (1 - _HELD_OUT_WIDTH))
        pairs.append((original, reconstruction))
        rows.append(
            {
                "photograph": name,
                "psnr": f"{psnr(original, reconstruction):.1f}",
                "held_out_psnr": f"{psnr(original[..., edge:], reconstruction[..., edge:]):.1f}",
                "bits_per_pixel": f"{bits:.2f}",
                "model": config.model,
                "updates": str(progress["update"]),
                "torch": torch.__version__,
            }
        )
    png = _grid(pairs)
    if len(png) > _MOST_BYTES:
        raise ValueError(f"the figure has {len(png)} bytes, expected at most {_MOST_BYTES}; lower _HEIGHT")
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "reconstructions.png").write_bytes(png)
    with NUMBERS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(caption(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

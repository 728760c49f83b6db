"""Reads an image file as a small square image."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# The limit for a file, which is decoded before it is cropped: 3 bytes per pixel, and 6 if it is rotated.
MOST_PIXELS = 80_000_000
_TIFF_BITS_PER_SAMPLE = 258


class ImageError(ValueError):
    """The file cannot be used as an image; the message names the remedy."""


def read_image(file: Path, size: int) -> Tensor:
    """The centre square of an image, resized: uint8 [3, size, size].

    The values are within 1 (of 255) of those of torchvision's `resize` of the shorter side (bilinear, antialiased) and
    `center_crop`. Only the square is resized: a resize of all 8,000,000 x 1 pixels of an image would take 24 GB.

    Raises:
        ImageError: the file is broken, has more than 8 bits per channel, or more than MOST_PIXELS pixels.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that are rejected below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(file, formats=_FORMATS)
        with opened:
            _check(file, opened)
            image = ImageOps.exif_transpose(opened).convert("RGB")
        square = image.resize((size, size), Image.Resampling.BILINEAR, box=_square(image.size, size))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(file, str(error)) from error
    except Exception as error:  # a decoder may raise any error for a broken file
        reason = " ".join(str(error).split())
        raise ImageError(f"{file} cannot be read as an image ({reason}); repair or remove it") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _square(image_size: tuple[int, int], size: int) -> tuple[float, float, float, float]:
    """The square of an image (width, height) as left, top, right and bottom."""
    shorter = min(image_size)
    bounds = []
    for length in image_size:
        resized = length * size // shorter
        first = round((resized - size) / 2)
        bounds.append((first * length / resized, (first + size) * length / resized))
    (left, right), (top, bottom) = bounds
    return left, top, right, bottom


def _check(file: Path, image: Image) -> None:
    """Check size and depth in the header of an image, before its pixels are decoded."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise _too_large(file, f"{width:,} x {height:,} pixels")
    found = None
    if image.mode.startswith(("I", "F")):
        found = f"mode {image.mode}"
    elif (bits := _bits(file, image)) > 8:
        found = f"{bits} bits per channel"
    if found:
        raise ImageError(f"{file} has pixels of more than 8 bits ({found}); convert it to 8 bits or remove it")


def _bits(file: Path, image: Image) -> int:
    """Bits per channel; Pillow silently drops those beyond 8."""
    if image.format == "PNG":
        with file.open("rb") as opened:
            # Byte 24 follows the signature, length and name of the first chunk, width and height.
            return opened.read(25)[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,)))  # type: ignore[attr-defined]
    return 8


def _too_large(file: Path, size: str) -> ImageError:
    return ImageError(
        f"{file} is too large ({size}), expected at most {MOST_PIXELS:,} pixels; make it smaller or remove it"
    )

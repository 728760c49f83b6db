"""Image files of every size and depth, and files that only have the suffix of an image."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional

from models.training import image_file
from models.training.data import SetupError, load

from ..runs import ROOT, write_images


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", 20)
    return tmp_path / "images"


def loaded(folder):
    images = load(f"folder:{folder}", Path("unused"))
    return len(images.train) + len(images.held_out)


def pixels(width, height):
    """Smooth colours with noise, as in photographs."""
    generator = np.random.default_rng(width + height)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + generator.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "size",
    [
        (32, 32),
        (64, 64),
        (640, 480),
        (480, 640),
        (1000, 37),
        (37, 1000),
        (33, 32),
        (31, 20),
        (20, 31),
        (5, 400),
        (1, 1),
    ],
)
def test_read_image_is_within_one_level_of_torchvision(size, tmp_path):
    Image.fromarray(pixels(*size)).save(tmp_path / "x.png")
    whole = functional.resize(Image.open(tmp_path / "x.png"), 32)
    expected = functional.pil_to_tensor(functional.center_crop(whole, 32))
    read = image_file.read_image(tmp_path / "x.png", 32)
    assert read.dtype == torch.uint8
    assert (read.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_with_any_orientation_equals_upright_image(orientation, tmp_path):
    image = Image.fromarray(pixels(121, 60))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    upright = functional.resize(ImageOps.exif_transpose(Image.open(tmp_path / "x.png")), 32)
    expected = functional.pil_to_tensor(functional.center_crop(upright, 32))
    assert (image_file.read_image(tmp_path / "x.png", 32).int() - expected.int()).abs().max() <= 1


_LIMITED = """
import resource, sys
from models.training.data import load
import PIL.Image, torchvision.transforms
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
from pathlib import Path
print(load("folder:" + sys.argv[1], Path("unused")).train.shape)
"""


@pytest.mark.parametrize("size", [(8_000_000, 1), (1, 8_000_000)])
def test_folder_with_extremely_long_image_needs_little_memory(size, folder):
    Image.new("L", size).save(folder / "long.png")
    assert (folder / "long.png").stat().st_size < 100_000
    words = [sys.executable, "-c", _LIMITED, str(folder), str(12 * 2**30)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-300:]


def test_folder_with_too_large_image_names_size_limit_and_remedy(folder):
    # 20,000 x 5,000 pixels of one bit; the size in the header is checked before the pixels.
    Image.new("1", (20_000, 5_000)).save(folder / "large.png")
    message = r"large\.png is too large \(20,000 x 5,000 pixels\), expected at most 80,000,000 pixels; make it smaller"
    with pytest.raises(SetupError, match=message):
        loaded(folder)
    Image.new("1", (20_000, 10_000)).save(folder / "large.png")
    with pytest.raises(SetupError, match=r"large\.png is too large \(.*200000000 pixels"):
        loaded(folder)


def test_folder_with_special_files_skips_them(folder):
    # The data set contains the images of all sub-folders.
    (folder / "deeper.png").mkdir()
    write_images(folder / "deeper.png", 1)
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "linked.png").symlink_to("0.png")
    (folder / "device.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        # The path of a socket has to be short.
        before = Path.cwd()
        os.chdir(folder)
        server.bind("socket.png")
        os.chdir(before)
        # In its own process, because a pipe could block it forever.
        code = f"from tests.models.training.test_image_file import *; print(loaded({str(folder)!r}))"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "22", result.stderr[-300:]


def _deep_png(path):
    """16 bits per channel, which Pillow cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(6 * 40) for _ in range(40))
    header = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def _deep_tiff(path):
    """16 bits per channel, uncompressed: the fields of the first directory are type 3 (16 bits) or 4 (32 bits)."""
    data_at = 8 + 2 + 12 * 9 + 4
    bits_at = data_at + 40 * 40 * 6
    fields = [(256, 4, 1, 40), (257, 4, 1, 40), (258, 3, 3, bits_at), (259, 3, 1, 1), (262, 3, 1, 2)]
    fields += [(273, 4, 1, data_at), (277, 3, 1, 3), (278, 4, 1, 40), (279, 4, 1, 40 * 40 * 6)]
    directory = struct.pack("<H", 9) + b"".join(struct.pack("<HHII", *field) for field in fields) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + bytes(40 * 40 * 6) + struct.pack("<HHH", 16, 16, 16))


@pytest.mark.parametrize("write", [_deep_png, _deep_tiff])
def test_folder_with_16_bit_image_names_depth(write, folder):
    path = folder / ("deep.png" if write is _deep_png else "deep.tiff")
    write(path)
    # Pillow reads it and drops the lower 8 bits.
    assert Image.open(path).convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(
        SetupError, match=rf"{path.name} has pixels of more than 8 bits \(16 bits per channel\); convert it"
    ):
        loaded(folder)


def test_folder_with_file_of_another_format_names_it(folder):
    (folder / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n")
    with pytest.raises(SetupError, match=r"x\.png cannot be read as an image \(cannot identify image file"):
        loaded(folder)

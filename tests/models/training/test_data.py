from __future__ import annotations

import gzip
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from PIL import Image

from models.training import data
from models.training.data import ImageSet, SetupError, load
from models.training.image_file import read_image


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "deeper").mkdir()
    for i in range(30):
        size = (40 + i, 64) if i % 2 else (33, 50)
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / ("deeper" if i % 3 else ".") / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_load_of_patches_is_reproducible_and_attributed():
    images = load("patches", Path("unused"))
    assert images.train.shape == (20000, 3, 32, 32)
    assert images.held_out.shape == (2000, 3, 32, 32)
    assert images.train.dtype == torch.uint8
    # The patches of photographs differ and have detail.
    assert len(images.held_out[:200].flatten(1).unique(dim=0)) > 190
    assert images.held_out.float().std((1, 2, 3)).median() > 5
    for name in ("NASA", "CC BY 2.0", "Middlebury"):
        assert name in images.attribution
    again = load("patches", Path("unused"))
    assert torch.equal(again.train, images.train)


def test_load_of_patches_with_held_out_images_shares_no_pixel_with_training(monkeypatch):
    # The value of each pixel is its column.
    monkeypatch.setattr(data, "_photograph", lambda _: torch.arange(200, dtype=torch.uint8).expand(3, 64, 200))
    images = load("patches", Path("unused"))
    assert images.train.max() < images.held_out.min()
    assert images.train.min() == 0
    assert images.held_out.max() == 199


def test_train_variance_equals_variance_of_training_pixels():
    train = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    images = ImageSet(train, torch.zeros(5, 3, 8, 8, dtype=torch.uint8), "")
    assert images.train_variance() == pytest.approx((train.double() / 255).var(correction=0).item())


def test_load_of_folder_holds_out_every_tenth_image(folder):
    images = load(f"folder:{folder}", Path("unused"))
    assert images.train.shape == (27, 3, 32, 32)
    assert images.held_out.shape == (3, 3, 32, 32)
    assert str(folder) in images.attribution
    both = torch.cat([images.train, images.held_out]).flatten(1)
    assert len(both.unique(dim=0)) == 30


def test_load_of_folder_with_broken_image_names_it(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    with pytest.raises(SetupError, match=r"broken\.png cannot be read as an image .*remove it"):
        load(f"folder:{folder}", Path("unused"))


def test_read_image_with_orientation_tag_is_upright(folder):
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 3  # rotated by 180 degrees
    image.save(folder / "turned.png", exif=exif)
    turned = read_image(folder / "turned.png", 32)
    assert turned[:, 0].max() == 0
    assert turned[:, -1].min() == 255


def test_read_image_of_any_mode_is_rgb(folder):
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        Image.new(mode, (40, 40)).save(folder / f"{mode}.tiff")
        assert read_image(folder / f"{mode}.tiff", 32).shape == (3, 32, 32)
    Image.fromarray(np.zeros((40, 40), dtype=np.uint16)).save(folder / "deep.png")
    with pytest.raises(SetupError, match=r"deep\.png has pixels of more than 8 bits"):
        load(f"folder:{folder}", Path("unused"))


def test_load_of_folder_without_images_raises(tmp_path):
    with pytest.raises(SetupError, match="is not a folder"):
        load("folder:", Path("unused"))
    with pytest.raises(SetupError, match="is not a folder"):
        load(f"folder:{tmp_path / 'none'}", Path("unused"))
    with pytest.raises(SetupError, match=r"expected at least 10 images .*, got 0"):
        load(f"folder:{tmp_path}", Path("unused"))


def test_load_of_unknown_set_names_the_known_ones():
    with pytest.raises(
        SetupError, match=r"expected data to be one of patches, cifar10, .* or folder:PATH, got 'mnist'"
    ):
        load("mnist", Path("unused"))


@pytest.mark.parametrize(
    ("name", "cls", "kind"),
    [("cifar10", "CIFAR10", "NHWC"), ("svhn", "SVHN", "NCHW"), ("fashion-mnist", "FashionMNIST", "NHW")],
)
def test_load_of_torchvision_set_converts_its_images(name, cls, kind, monkeypatch, tmp_path):
    import torchvision.datasets

    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", tmp_path / "none")
    calls = []

    class Stub:
        def __init__(self, root, download, train=True, split="train"):
            calls.append((root, download))
            count = 20 if train and split == "train" else 5
            shape = {"NHWC": (count, 32, 32, 3), "NCHW": (count, 3, 32, 32), "NHW": (count, 28, 28)}[kind]
            pixels = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
            self.data = torch.from_numpy(pixels) if kind == "NHW" else pixels

    monkeypatch.setattr(torchvision.datasets, cls, Stub)
    images = load(name, tmp_path / "data")
    assert calls == [(str(tmp_path / "data"), True)] * 2
    channels, side = (1, 28) if kind == "NHW" else (3, 32)
    assert images.train.shape == (20, channels, side, side)
    assert images.held_out.shape == (5, channels, side, side)
    if kind == "NHWC":
        assert images.train[0, :, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["cifar10", "svhn", "fashion-mnist"])
def test_load_without_network_names_remedy(name, monkeypatch, tmp_path):
    import urllib.request

    def refuse(*args, **kwargs):
        raise urllib.request.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", tmp_path / "none")
    with pytest.raises(SetupError, match=rf"(?s)data set {name} could not be read .*Check the network.*--data patches"):
        load(name, tmp_path / "data")


def _idx(path: Path, pixels: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, pixels.ndim) + struct.pack(f">{pixels.ndim}I", *pixels.shape)
    path.write_bytes(gzip.compress(header + pixels.tobytes()))


def test_load_of_fashion_mnist_reads_the_debian_package(monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 10)):
        _idx(package / f"{part}-images-idx3-ubyte.gz", generator.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        _idx(package / f"{part}-labels-idx1-ubyte.gz", generator.integers(0, 10, (count,), dtype=np.uint8))
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", package)
    images = load("fashion-mnist", tmp_path / "data")
    assert images.train.shape == (40, 1, 28, 28)
    assert images.held_out.shape == (10, 1, 28, 28)
    assert torch.equal(load("fashion-mnist", tmp_path / "data").train, images.train)


def test_load_of_fashion_mnist_with_broken_package_leaves_no_file(monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    whole = gzip.compress(bytes(10000))
    (package / "train-images-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", package)
    with pytest.raises(SetupError, match=r"train-images-idx3-ubyte\.gz is broken .*install .* again"):
        load("fashion-mnist", tmp_path / "data")
    assert list((tmp_path / "data/FashionMNIST/raw").iterdir()) == []


def test_unpack_by_several_threads_writes_the_file_once(tmp_path):
    packed = tmp_path / "images.gz"
    content = np.random.default_rng(0).bytes(2**24)
    packed.write_bytes(gzip.compress(content, compresslevel=1))
    target = tmp_path / "raw" / "images"
    together = Barrier(4)

    def unpack(_: int) -> None:
        together.wait()
        data._unpack(packed, target)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(unpack, range(4)))
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.skipif(
    not data._DEBIAN_FASHION_MNIST.is_dir(), reason="the package dataset-fashion-mnist is not installed"
)
def test_load_of_installed_fashion_mnist_has_its_shape(tmp_path):
    images = load("fashion-mnist", tmp_path)
    assert images.train.shape == (60000, 1, 28, 28)
    assert images.held_out.shape == (10000, 1, 28, 28)

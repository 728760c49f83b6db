"""Image sets, held in memory as uint8."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .image_file import SUFFIXES, ImageError, read_image

T = TypeVar("T")

_PATCH_SIZE = 32
_PATCHES_PER_PHOTOGRAPH = {"train": 2000, "held_out": 200}
# The rightmost part of each photograph gives the held-out patches and no training patch.
_HELD_OUT_WIDTH = 0.2
_FOLDER_HELD_OUT = 10
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# The photographs in the wheels of scikit-image and scikit-learn: function or file, and attribution.
_PHOTOGRAPHS = {
    "astronaut": "Eileen Collins, NASA, public domain (scikit-image)",
    "chelsea": "Chelsea the cat, Stefan van der Walt, CC0 (scikit-image)",
    "coffee": "Coffee cup, Rachel Michetti at Pikolo Espresso Bar, CC0 (scikit-image)",
    "hubble_deep_field": "Hubble eXtreme Deep Field, NASA, public domain (scikit-image)",
    "immunohistochemistry": "Colonic glands, Center for Microscopy and Molecular Imaging (scikit-image)",
    "retina": "Fundus of a left eye, Mikael Häggström, CC0 (scikit-image)",
    "rocket": "Launch of DSCOVR, SpaceX, public domain (scikit-image)",
    "stereo_motorcycle": "Left image of Motorcycle, Middlebury stereo benchmark 2014 (scikit-image)",
    "china.jpg": "Summer Palace, danielbuechele on Flickr, CC BY 2.0 (scikit-learn)",
    "flower.jpg": "Dahlia, vultilion on Flickr, CC BY 2.0 (scikit-learn)",
}


class SetupError(Exception):
    """The run cannot start, for example without its images; the message names the remedy."""


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 [N, C, H, W], and their attribution."""

    train: Tensor
    held_out: Tensor
    attribution: str

    def train_variance(self) -> float:
        """Variance of all training pixels in [0, 1], by which the error is normalised."""
        histogram = torch.bincount(self.train.flatten(), minlength=256).double()
        level = torch.arange(256, dtype=torch.float64) / 255
        probability = histogram / histogram.sum()
        return float((probability * level**2).sum() - (probability * level).sum() ** 2)


def load(name: str, root: Path) -> ImageSet:
    """The image set `name`: patches, cifar10, svhn, fashion-mnist or folder:PATH; downloads go to `root`.

    Raises:
        SetupError: the set is unknown, cannot be downloaded, or has a broken file.
    """
    if name.startswith("folder:"):
        return _folder(Path(name.removeprefix("folder:")))
    loaders: dict[str, Callable[[Path], ImageSet]] = {
        "patches": lambda _: _patches(),
        "cifar10": _cifar10,
        "svhn": _svhn,
        "fashion-mnist": _fashion_mnist,
    }
    if name not in loaders:
        raise SetupError(f"expected data to be one of {', '.join(loaders)} or folder:PATH, got {name!r}")
    return loaders[name](root)


def _patches() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    train, held_out = [], []
    for name in _PHOTOGRAPHS:
        image = _photograph(name)  # [C, H, W]
        edge = round(image.shape[2] * (1 - _HELD_OUT_WIDTH))
        train.append(_random_crops(image[:, :, :edge], _PATCHES_PER_PHOTOGRAPH["train"], generator))
        held_out.append(_random_crops(image[:, :, edge:], _PATCHES_PER_PHOTOGRAPH["held_out"], generator))
    # Interleaved, so that the first images show all photographs.
    return ImageSet(
        torch.stack(train, dim=1).flatten(0, 1),
        torch.stack(held_out, dim=1).flatten(0, 1),
        "; ".join(_PHOTOGRAPHS.values()),
    )


def _photograph(name: str) -> Tensor:
    try:
        if name.endswith(".jpg"):
            from sklearn.datasets import load_sample_image

            image = load_sample_image(name)
        else:
            from skimage import data

            image = getattr(data, name)()
    except Exception as error:  # scikit-image may try to download a newer file
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SetupError(
            f"the photograph {name} cannot be read ({reason}); install scikit-image and scikit-learn again with:"
            " pip install 'dlvae-kernels[viz]'"
        ) from error
    # A stereo pair has two views and a disparity map; only the first view is used.
    image = image[0] if isinstance(image, tuple) else image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _random_crops(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random square crops of image [C, H, W]: [count, C, size, size]."""
    windows = image.unfold(1, _PATCH_SIZE, 1).unfold(2, _PATCH_SIZE, 1)  # [C, rows, columns, size, size]
    row, column = (torch.randint(size, (count,), generator=generator) for size in windows.shape[1:3])
    return windows[:, row, column].transpose(0, 1).contiguous()


def _cifar10(root: Path) -> ImageSet:
    from torchvision.datasets import CIFAR10

    def images(train: bool) -> Tensor:
        data = _downloaded("cifar10", root, lambda: CIFAR10(str(root), train=train, download=True).data)
        return torch.from_numpy(data).permute(0, 3, 1, 2).contiguous()

    return ImageSet(images(True), images(False), "CIFAR-10, Alex Krizhevsky 2009")


def _svhn(root: Path) -> ImageSet:
    from torchvision.datasets import SVHN

    def images(split: str) -> Tensor:
        return torch.from_numpy(_downloaded("svhn", root, lambda: SVHN(str(root), split=split, download=True).data))

    return ImageSet(images("train"), images("test"), "SVHN, Netzer et al. 2011")


def _fashion_mnist(root: Path) -> ImageSet:
    from torchvision.datasets import FashionMNIST

    raw = root / "FashionMNIST" / "raw"

    def read(train: bool) -> Tensor:
        for packed in sorted(_DEBIAN_FASHION_MNIST.glob("*-ubyte.gz")):
            _unpack(packed, raw / packed.stem)
        return FashionMNIST(str(root), train=train, download=True).data

    def images(train: bool) -> Tensor:
        return _downloaded("fashion-mnist", root, lambda: read(train))[:, None].contiguous()

    return ImageSet(images(True), images(False), "Fashion-MNIST, Zalando SE, MIT licence")


def _unpack(packed: Path, target: Path) -> None:
    """Unpack a gzip file atomically, unless the target exists."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # In its own folder, because other processes may unpack the same file.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / target.name
        try:
            with gzip.open(packed, "rb") as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise SetupError(
                f"{packed} is broken ({error}); install the package dataset-fashion-mnist again"
            ) from error
        partial.replace(target)


def _downloaded(name: str, root: Path, read: Callable[[], T]) -> T:
    """Read a torchvision set; its errors become a SetupError that names the remedy."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"the folder {root} for downloads cannot be created ({error}); choose another --data-dir"
        ) from error
    try:
        return read()
    except SetupError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SetupError(
            f"the data set {name} could not be read from {root} or downloaded ({reason})."
            f" Check the network, or put the files into {root}; delete a broken file there and try again."
            " `--data patches` needs no download."
        ) from error


def _folder(path: Path) -> ImageSet:
    """Every image under `path`, its shorter side resized to 32 and centre-cropped; every tenth is held out."""
    if path == Path() or not path.is_dir():
        raise SetupError(f"expected --data folder:PATH to be a folder of images, got {path}, which is not a folder")
    # Pipes, sockets, devices, folders and dangling links of such names are skipped.
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if len(files) < _FOLDER_HELD_OUT:
        raise SetupError(
            f"expected at least {_FOLDER_HELD_OUT} images ({', '.join(sorted(SUFFIXES))}) in {path}, got {len(files)}"
        )
    try:
        images = torch.stack([read_image(file, _PATCH_SIZE) for file in files])
    except ImageError as error:
        raise SetupError(str(error)) from error
    # The shuffle makes the split independent of the names; its seed is constant.
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    held_out = len(images) // _FOLDER_HELD_OUT
    return ImageSet(images[held_out:], images[:held_out], f"the images in {path}")

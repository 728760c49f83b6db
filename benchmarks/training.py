"""The entries of a whole training step, beside the seed notebook's loop as it is written."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

from models.autoencoder import Autoencoder
from models.training.config import Config
from models.training.run import Run

from . import baselines, judge, notebook
from .entry import Call, Contender, Entry, Inputs, Tolerance, Verdict
from .layers import DICTIONARY_LEARNING
from .sizes import CIFAR, DICTIONARY

# Updates that compile, choose algorithms and, on a GPU, capture.
BEFORE_TIMING = 5
_POSITIONS = 64  # of an image of 32 x 32
_LR = 1e-4
_CROPS = 2000  # of each photograph


@lru_cache
def images() -> str:
    """The image set of training runs: patches, or without scikit-image crops of scikit-learn's two photographs."""
    if importlib.util.find_spec("skimage"):
        return "patches"
    from sklearn.datasets import load_sample_image
    from torchvision.transforms.functional import crop, to_pil_image

    folder = Path(tempfile.mkdtemp(prefix="dlvae-crops-"))
    atexit.register(shutil.rmtree, folder)
    generator = torch.Generator().manual_seed(0)
    for name in ("china.jpg", "flower.jpg"):
        photograph = to_pil_image(load_sample_image(name))
        for i in range(_CROPS):
            left, top = (int(torch.randint(size - 32, (), generator=generator)) for size in photograph.size)
            crop(photograph, top, left, 32, 32).save(folder / f"{name}-{i}.png")
    print(f"scikit-image is not installed: training runs see {2 * _CROPS} crops of scikit-learn's photographs")
    return f"folder:{folder}"


def _run(model: str, inputs: Inputs, precision: str = "float32") -> Run:
    """A training run of ours with the notebook's hyper-parameters; it writes nothing."""
    size = inputs.size
    config = Config(
        model=model,  # type: ignore[arg-type]
        data=images(),
        batch_size=size.n // _POSITIONS,
        embedding_dim=size.d,
        num_embeddings=size.k,
        sparsity_level=size.kept,
        init="uniform",
        decay=0.99,
        dead_code_threshold=0.0,
        gradient="straight_through",
        lr=_LR,
        schedule="constant",
        precision=precision,  # type: ignore[arg-type]
        device=str(inputs.x.device),
    )
    return Run(config, Path("unwritten"))


def _ours(model: str, precision: str = "float32") -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        if precision == "bfloat16":
            baselines.needs("cuda", inputs)
        run = _run(model, inputs, precision)
        loss = _loss(run.model, run.batches[0], run.variance)
        for _ in range(BEFORE_TIMING):
            run.step()
        return Call(run.step, answer=lambda out: (loss,))

    return prepare


class _Images(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: each image becomes a PIL image and then a tensor, when it is asked for."""

    def __init__(self, images: Tensor) -> None:
        from torchvision import transforms

        self.data = images.permute(0, 2, 3, 1).numpy()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.0,) * 3, (1.0,) * 3)])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.data[index])), 0


class NotebookModel(Autoencoder):
    """The notebook's network around one of its own layers."""

    def __init__(self, like: Autoencoder, config: Config) -> None:
        super().__init__(config.hiddens, config.residual_layers, config.residual_hiddens, config.embedding_dim, 3)
        self._dl: nn.Module
        if config.model == "dlvae":
            self._dl = notebook.DictionaryLearning(
                config.embedding_dim, config.num_embeddings, config.sparsity, config.sparsity_level
            )
        else:
            self._dl = notebook.VectorQuantizerEMA(like.codes, config.commitment_cost, config.decay, 1e-5)
        self.to(like.codes.device).load_state_dict(like.state_dict(), strict=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, latents, *_, representation = self._dl(self.encode(x))
        return loss, self.decode(latents), representation


def notebook_loop(run: Run) -> tuple[Callable[[], None], list[float]]:
    """An update as in its loop, of a model that starts as that of `run`, and the errors of the updates so far.

    A fresh iterator at each step, images converted one by one, a wait for the error.
    """
    network = NotebookModel(run.model, run.config)
    # It pins always, which does nothing but warn where there is no GPU.
    loader = DataLoader(
        _Images(run.images.train), run.config.batch_size, shuffle=True, pin_memory=run.device.type == "cuda"
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=run.config.lr, amsgrad=False)
    errors: list[float] = []

    def step() -> None:
        data, _ = next(iter(loader))
        data = data.to(run.device)
        optimizer.zero_grad()
        quantizer_loss, reconstruction, _ = network(data)
        error = mse_loss(reconstruction, data) / run.variance
        (error + quantizer_loss).backward()
        optimizer.step()
        errors.append(error.item())

    return step, errors


def _notebook(model: str) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        run = _run(model, inputs)
        loss = _loss(NotebookModel(run.model, run.config), run.batches[0], run.variance)
        step, _ = notebook_loop(run)
        return Call(step, answer=lambda out: (loss,))

    return prepare


def _loss(model: nn.Module, images: Tensor, variance: float) -> Tensor:
    """The loss on the first batch, before any step: by it the contenders are compared."""
    model.eval()
    with torch.no_grad():
        loss, reconstruction, _ = model(images)
    model.train()
    return mse_loss(reconstruction, images) / variance + loss


def _judge(model: str) -> Callable[..., Verdict]:
    def judge_loss(inputs: Inputs, answer: tuple[Tensor, ...], gradients: Any, tolerance: Tolerance) -> Verdict:
        run = _run(model, inputs)
        return judge.close((_loss(run.model.double(), run.batches[0].double(), run.variance),), answer, tolerance)

    return judge_loss


def _entry(model: str, ops: tuple[str, ...], size: Any) -> Entry:
    return Entry(
        f"train {model}",
        "tests/models/test_train.py",
        ops,
        {"cpu": (size,), "cuda": (size,)},
        (
            Contender("dlvae_kernels", _ours(model), exact=True),
            Contender("dlvae_kernels, autocast", _ours(model, "bfloat16"), precision="bfloat16"),
            Contender("notebook", _notebook(model)),
        ),
        _judge(model),
    )


TRAINING = (
    _entry("vqvae-ema", ("vector_quantize_fwd", "vector_quantize_bwd", "ema_statistics", "ema_step"), CIFAR),
    _entry("dlvae", DICTIONARY_LEARNING.ops, DICTIONARY),
)

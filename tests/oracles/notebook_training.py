"""The training loop of the VQ-VAE notebook, with its layers in the network of this project."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

from models.autoencoder import Autoencoder
from models.training.config import Config
from models.training.run import Run

from .notebook import DictionaryLearning, VectorQuantizerEMA


class _Images(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR10 loads them: each access makes a PIL image and converts it to a tensor."""

    def __init__(self, images: Tensor) -> None:
        from torchvision import transforms

        self.data = images.permute(0, 2, 3, 1).numpy()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.0,) * 3, (1.0,) * 3)])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.data[index])), 0


class Model(Autoencoder):
    """The network of the VQ-VAE notebook with one of its layers, initialised like a model of this library."""

    def __init__(self, like: Autoencoder, config: Config) -> None:
        super().__init__(config.hiddens, config.residual_layers, config.residual_hiddens, config.embedding_dim, 3)
        self._dl: nn.Module
        if config.model == "dlvae":
            self._dl = DictionaryLearning(
                config.embedding_dim, config.num_embeddings, config.sparsity, config.sparsity_level
            )
        else:
            self._dl = VectorQuantizerEMA(like.codes, config.commitment_cost, config.decay, 1e-5)
        self.to(like.codes.device).load_state_dict(like.state_dict(), strict=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, latents, *_, representation = self._dl(self.encode(x))
        return loss, self.decode(latents), representation


def training_loop(run: Run) -> tuple[Callable[[], None], list[float]]:
    """A function that makes one update as the notebook's loop does, and the list of the errors of its updates.

    Each update makes a new iterator over the images, converts the images one by one, and waits for the error.
    """
    network = Model(run.model, run.config)
    # The notebook pins memory on the CPU too, where that has no effect but a warning.
    pins = run.device.type == "cuda"
    loader = DataLoader(_Images(run.images.train), run.config.batch_size, shuffle=True, pin_memory=pins)
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

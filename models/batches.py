"""The shuffled batches of images that training draws."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .data import DataError
from .ranks import Ranks


class Order:
    """The order of the images in each epoch, and the part of a batch that one of several ranks sees.

    It follows from the seed and the number of the epoch alone, so that the number of the update is all that resuming
    needs. What is left over at the end of an epoch is passed over. The ranks together see the rows, in their order,
    that one process sees.
    """

    def __init__(self, images: int, batch_size: int, seed: int, ranks: Ranks | None = None) -> None:
        ranks = ranks or Ranks()
        if not 1 <= batch_size <= images:
            raise DataError(f"batch_size is {batch_size}; it needs to lie in [1, {images}], the training images")
        if batch_size % ranks.count:
            raise DataError(f"batch_size is {batch_size}; it needs to be a multiple of {ranks.count}, the ranks")
        self.images = images
        self.batch_size = batch_size
        self.share = batch_size // ranks.count  # of this rank
        self.first = ranks.rank * self.share
        self.batches = images // batch_size  # in an epoch
        self._seed = seed

    def epoch(self, number: int) -> Tensor:
        """Numbers of the images in the order of an epoch, [images]."""
        mixed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        return torch.randperm(self.images, generator=torch.Generator().manual_seed(mixed))


class Batches:
    """Batches of this rank as float32 in [0, 1], from images that lie on the device whole, as uint8 [N, C, H, W]."""

    def __init__(self, images: Tensor, order: Order, device: torch.device, channels_last: bool) -> None:
        self._images = images.to(device)
        self._order = order
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._epoch = -1
        self._shuffled = torch.zeros(order.images, dtype=torch.int64, device=device)
        self._places = order.first + torch.arange(order.share, device=device)

    def prepare(self, update: int) -> None:
        """What the host does before an update, counted from 0."""
        epoch = update // self._order.batches
        if epoch != self._epoch:
            self._shuffled.copy_(self._order.epoch(epoch))
            self._epoch = epoch

    def take(self, clock: Tensor) -> Tensor:
        """The batch of the update that was prepared; `clock` holds its number, int64 on the device: [B, C, H, W]."""
        begin = clock % self._order.batches * self._order.batch_size
        chosen = self._shuffled.index_select(0, begin + self._places)
        return self._images.index_select(0, chosen).float().div_(255).contiguous(memory_format=self._format)

    def __getitem__(self, update: int) -> Tensor:
        """The batch of an update, counted from 0."""
        self.prepare(update)
        return self.take(torch.tensor(update, device=self._images.device))

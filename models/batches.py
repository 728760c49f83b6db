"""The shuffled batches of images that training draws."""

from __future__ import annotations

import atexit
import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .data import DataError
from .ranks import Ranks

# Of the free memory of a GPU, what images may take.
_MOST_OF_FREE = 0.5
_WORKERS = 2
# Batches that each worker gathers before they are asked for.
_AHEAD = 4
# Batches on their way to a GPU.
_MOST_SENT = 16


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


class Batches(ABC):
    """Batches of this rank as float32 in [0, 1] on a device; from uint8 images [N, C, H, W]."""

    def __init__(self, order: Order, device: torch.device, channels_last: bool) -> None:
        self._order = order
        self._device = device
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    @abstractmethod
    def prepare(self, update: int) -> None:
        """What the host does before an update, counted from 0; it does not wait for the device."""

    @abstractmethod
    def take(self, clock: Tensor) -> Tensor:
        """The batch of the update that was prepared; `clock` holds its number, int64 on the device: [B, C, H, W]."""

    def __getitem__(self, update: int) -> Tensor:
        """The batch of an update, counted from 0."""
        self.prepare(update)
        return self.take(torch.tensor(update, device=self._device))

    def _floats(self, pixels: Tensor) -> Tensor:
        return pixels.float().div_(255).contiguous(memory_format=self._format)

    def _send(self, host: Tensor, place: Tensor) -> None:
        """Copy to `place` on the device after the work that it has got, without waiting for it."""
        pinned = host.pin_memory() if self._device.type == "cuda" and not host.is_pinned() else host
        place.copy_(pinned, non_blocking=True)


class ResidentBatches(Batches):
    """From images that lie on the device whole, beside their order in this epoch: the device draws each batch."""

    def __init__(self, images: Tensor, order: Order, device: torch.device, channels_last: bool) -> None:
        super().__init__(order, device, channels_last)
        self._images = images.to(device)
        self._epoch = -1
        self._shuffled = torch.zeros(order.images, dtype=torch.int64, device=device)
        self._places = order.first + torch.arange(order.share, device=device)

    def prepare(self, update: int) -> None:
        epoch = update // self._order.batches
        if epoch != self._epoch:
            self._send(self._order.epoch(epoch), self._shuffled)
            self._epoch = epoch

    def take(self, clock: Tensor) -> Tensor:
        begin = clock % self._order.batches * self._order.batch_size
        chosen = self._shuffled.index_select(0, begin + self._places)
        return self._floats(self._images.index_select(0, chosen))


class StreamedBatches(Batches):
    """From images in the memory of the host: worker processes gather them ahead, in pinned memory for a GPU."""

    def __init__(self, images: Tensor, order: Order, device: torch.device, channels_last: bool) -> None:
        super().__init__(order, device, channels_last)
        self._images = images
        self._next = -1
        self._stream: Iterator[Tensor] = iter(())
        self._sent: deque[torch.cuda.Event] = deque()
        # Workers do not end by a signal, which Python would send them when it ends.
        atexit.register(self.close)
        self._batch = torch.zeros(order.share, *images.shape[1:], dtype=torch.uint8, device=device)

    def prepare(self, update: int) -> None:
        if update != self._next:
            self._stream = self._from(update)
        self._send(next(self._stream), self._batch)
        self._next = update + 1
        if self._device.type == "cuda":
            # Batches stay in pinned memory until they are copied: only so many may be under way.
            self._sent.append(torch.cuda.current_stream(self._device).record_event())
            if len(self._sent) > _MOST_SENT:
                self._sent.popleft().synchronize()

    def take(self, clock: Tensor) -> Tensor:
        return self._floats(self._batch)

    def close(self) -> None:
        """Let the workers end; the next batch begins others."""
        self._stream, self._next = iter(()), -1

    def _from(self, update: int) -> Iterator[Tensor]:
        return iter(
            DataLoader(
                _Images(self._images),
                batch_sampler=_Chosen(self._order, update),
                num_workers=_WORKERS,
                prefetch_factor=_AHEAD,
                pin_memory=self._device.type == "cuda",
                collate_fn=_as_it_is,
                worker_init_fn=_ignore_signals,
                # It draws a seed for its workers, which is not to move the random stream of the layers.
                generator=torch.Generator(),
            )
        )


class _Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]

    def __getitems__(self, chosen: list[int]) -> Tensor:
        """The images of a batch at once."""
        return self._images[torch.tensor(chosen)]


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """What interrupts the run goes to its workers too, and is for the run to act on: it still needs them."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


class _Chosen(Sampler[list[int]]):
    """Numbers of the images of each batch of this rank, from an update on and without end."""

    def __init__(self, order: Order, update: int) -> None:
        self._order = order
        self._update = update

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order
        epoch, place = divmod(self._update, order.batches)
        while True:
            batches = order.epoch(epoch)[: order.batches * order.batch_size].view(order.batches, order.batch_size)
            for batch in batches[place:, order.first : order.first + order.share]:
                yield batch.tolist()
            epoch, place = epoch + 1, 0


def make_batches(images: Tensor, order: Order, device: torch.device, channels_last: bool, loading: str) -> Batches:
    """Batches that are `loading`: "resident" or "streamed"; "auto": resident where the device has room for them."""
    if loading == "auto":
        loading = "resident" if _fits(images, device) else "streamed"
    kind = ResidentBatches if loading == "resident" else StreamedBatches
    return kind(images, order, device, channels_last)


def _fits(images: Tensor, device: torch.device) -> bool:
    return device.type == "cpu" or images.nbytes <= _MOST_OF_FREE * torch.cuda.mem_get_info(device)[0]

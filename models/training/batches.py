"""The shuffled batches of training images."""

from __future__ import annotations

import atexit
import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from .data import SetupError
from .ranks import Ranks

# The fraction of the free memory of a GPU that images may fill.
_RESIDENT_FRACTION = 0.5
_WORKERS = 2
# Batches that each worker prepares in advance.
_PREFETCH = 4
# Batches in pinned memory whose copy to the GPU has not finished.
_MOST_IN_FLIGHT = 16


class Order:
    """The order of the images in each epoch, and the part of each batch that a rank sees.

    The order depends on the seed and the number of the epoch only: the number of the update is enough to resume. The
    images left over at the end of an epoch are skipped. All ranks together see the batch of one process, in its order.
    """

    def __init__(self, images: int, batch_size: int, seed: int, ranks: Ranks | None = None) -> None:
        ranks = ranks or Ranks()
        if not 1 <= batch_size <= images:
            raise SetupError(
                f"expected batch_size to lie in [1, {images}], the number of training images, got {batch_size}"
            )
        if batch_size % ranks.count:
            raise SetupError(
                f"expected batch_size to be a multiple of {ranks.count}, the number of ranks, got {batch_size}"
            )
        self.images = images
        self.batch_size = batch_size
        self.rank_batch_size = batch_size // ranks.count
        self.offset = ranks.rank * self.rank_batch_size  # of this rank in a batch
        self.batches = images // batch_size  # per epoch
        self._seed = seed

    def epoch(self, number: int) -> Tensor:
        """Indices of the images in the order of an epoch, [images]."""
        mixed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        return torch.randperm(self.images, generator=torch.Generator().manual_seed(mixed))


class Batches(ABC):
    """Batches of this rank, float32 in [0, 1] on a device, from uint8 images [N, C, H, W]."""

    def __init__(self, order: Order, device: torch.device, channels_last: bool) -> None:
        self._order = order
        self._device = device
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    @abstractmethod
    def prepare(self, update: int) -> None:
        """The work of the host before an update, counted from 0; does not wait for the device."""

    @abstractmethod
    def take(self, clock: Tensor) -> Tensor:
        """The prepared batch [B, C, H, W]; `clock` is the number of its update, int64 on the device."""

    def __getitem__(self, update: int) -> Tensor:
        """The batch of an update, counted from 0."""
        self.prepare(update)
        return self.take(torch.tensor(update, device=self._device))

    def _floats(self, pixels: Tensor) -> Tensor:
        return pixels.float().div_(255).contiguous(memory_format=self._format)

    def _send(self, host: Tensor, target: Tensor) -> None:
        """Enqueue a copy to a tensor on the device."""
        pinned = host.pin_memory() if self._device.type == "cuda" and not host.is_pinned() else host
        target.copy_(pinned, non_blocking=True)


class ResidentBatches(Batches):
    """Batches that the device selects itself, from all images and the order of the epoch in its memory.

    A DataLoader would select them on the host, where a CUDA graph cannot repeat the selection.
    """

    def __init__(self, images: Tensor, order: Order, device: torch.device, channels_last: bool) -> None:
        super().__init__(order, device, channels_last)
        self._images = images.to(device)
        self._epoch = -1
        self._shuffled = torch.zeros(order.images, dtype=torch.int64, device=device)
        self._positions = order.offset + torch.arange(order.rank_batch_size, device=device)

    def prepare(self, update: int) -> None:
        epoch = update // self._order.batches
        if epoch != self._epoch:
            self._send(self._order.epoch(epoch), self._shuffled)
            self._epoch = epoch

    def take(self, clock: Tensor) -> Tensor:
        begin = clock % self._order.batches * self._order.batch_size
        indices = self._shuffled.index_select(0, begin + self._positions)
        return self._floats(self._images.index_select(0, indices))


class StreamedBatches(Batches):
    """Batches that the workers of a DataLoader select in the memory of the host; for a GPU they are pinned."""

    def __init__(self, images: Tensor, order: Order, device: torch.device, channels_last: bool) -> None:
        super().__init__(order, device, channels_last)
        self._images = images
        self._next = -1
        self._stream: Iterator[list[Tensor]] = iter(())
        self._in_flight: deque[torch.cuda.Event] = deque()
        # The workers ignore the signal that Python sends them at its end.
        atexit.register(self.close)
        self._batch = torch.zeros(order.rank_batch_size, *images.shape[1:], dtype=torch.uint8, device=device)

    def prepare(self, update: int) -> None:
        if update != self._next:
            self._stream = self._load_from(update)
        (batch,) = next(self._stream)
        self._send(batch, self._batch)
        self._next = update + 1
        if self._device.type == "cuda":
            # Bounds the pinned memory.
            self._in_flight.append(torch.cuda.current_stream(self._device).record_event())
            if len(self._in_flight) > _MOST_IN_FLIGHT:
                self._in_flight.popleft().synchronize()

    def take(self, clock: Tensor) -> Tensor:
        return self._floats(self._batch)

    def close(self) -> None:
        """End the workers; the next batch starts new ones."""
        self._stream, self._next = iter(()), -1

    def _load_from(self, update: int) -> Iterator[list[Tensor]]:
        return iter(
            DataLoader(
                TensorDataset(self._images),
                sampler=_BatchIndices(self._order, update),
                batch_size=None,  # the sampler yields the indices of whole batches
                num_workers=_WORKERS,
                prefetch_factor=_PREFETCH,
                pin_memory=self._device.type == "cuda",
                worker_init_fn=_ignore_signals,
                # The loader draws a seed for its workers; the default generator is that of the layers.
                generator=torch.Generator(),
            )
        )


def _ignore_signals(worker: int) -> None:
    """Leave SIGINT and SIGTERM, which reach the workers too, to the run: it needs the workers until it has saved."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


class _BatchIndices(Sampler[list[int]]):
    """Indices of the images of each batch of this rank, from an update on, without end."""

    def __init__(self, order: Order, update: int) -> None:
        self._order = order
        self._update = update

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order
        epoch, first = divmod(self._update, order.batches)
        while True:
            batches = order.epoch(epoch)[: order.batches * order.batch_size].view(order.batches, order.batch_size)
            for batch in batches[first:, order.offset : order.offset + order.rank_batch_size]:
                yield batch.tolist()
            epoch, first = epoch + 1, 0


def make_batches(images: Tensor, order: Order, device: torch.device, channels_last: bool, loading: str) -> Batches:
    """Batches of the kind `loading`: "resident", "streamed", or "auto": resident if the images fit on the device."""
    if loading == "auto":
        loading = "resident" if _fits(images, device) else "streamed"
    kind = ResidentBatches if loading == "resident" else StreamedBatches
    return kind(images, order, device, channels_last)


def _fits(images: Tensor, device: torch.device) -> bool:
    return device.type == "cpu" or images.nbytes <= _RESIDENT_FRACTION * torch.cuda.mem_get_info(device)[0]

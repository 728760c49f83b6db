"""The processes that train one model together, as torchrun starts them: one for each GPU, or several on CPUs."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

# One rank may download the images while the others wait.
_SETUP_TIMEOUT = timedelta(hours=2)


class RankLostError(Exception):
    """Another rank died or fell silent, or the network between the ranks failed."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model. All ranks call the methods, in the same order."""

    rank: int = 0
    count: int = 1
    local: int | None = None  # the rank within this machine, where there are several ranks
    # Waits longer than the others, for what comes before training.
    setup: Any = None

    @property
    def writes(self) -> bool:
        """Whether this is the one rank that writes files and tells how far the run is."""
        return self.rank == 0

    @contextmanager
    def in_turns(self) -> Iterator[None]:
        """Let rank 0 through, then one rank of each other machine, then the others; they go on together."""
        turn = 0 if self.rank == 0 else 1 if self.local == 0 else 2
        several = self.count > 1
        for _ in range(turn if several else 0):
            dist.barrier(self.setup)
        yield
        for _ in range(3 - turn if several else 0):
            dist.barrier(self.setup)

    def from_first(self, value: T) -> T:
        """What rank 0 gave."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, group=self.setup)
        return box[0]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any rank gave True."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag), device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def wrap(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module, with gradients that are means over the ranks."""
        if self.count == 1:
            return module
        # The layers keep the buffers equal; a broadcast of them would throw away what the other ranks counted.
        names = inspect.signature(DistributedDataParallel).parameters
        syncs = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {syncs: False, "device_ids": [device] if device.type == "cuda" else None}
        return DistributedDataParallel(module, **options, gradient_as_bucket_view=True)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn an error of communication into one that says so.

        Raises:
            RankLostError: another rank cannot be reached.
        """
        try:
            yield
        except RuntimeError as error:
            # NCCL has a type of its own for its errors, gloo has not.
            if self.count > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                what, *_ = str(error).splitlines()[0].split(". This is typically")
                raise RankLostError(f"rank {self.rank} can no longer reach another rank ({what})") from error
            raise


def join(device: torch.device, timeout: int) -> Ranks:
    """Meet the other ranks that torchrun has started, if it has.

    `device` is this rank's own; a rank that hears nothing from another for `timeout` seconds ends.
    """
    local = local_rank()
    if local is None:
        return Ranks()
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        options = {"backend": "nccl", "device_id": device}
    dist.init_process_group(timeout=timedelta(seconds=timeout), **options)
    setup = dist.new_group(backend="gloo", timeout=_SETUP_TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size(), local, setup)


def local_rank() -> int | None:
    """Of this process on its machine, or None where it is the only one that trains."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return int(os.environ["LOCAL_RANK"]) if several else None


def leave(ranks: Ranks) -> None:
    """Part from the other ranks at the end of the common work."""
    if ranks.count > 1:
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End this process; of several ranks at once, as a thread of gloo can abort Python while it takes itself down."""
    if local_rank() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

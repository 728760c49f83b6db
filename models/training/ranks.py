"""The ranks: the processes that train one model together, started by torchrun, one per GPU or several on CPUs."""

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

# The other ranks wait while one downloads the images.
_SETUP_TIMEOUT = timedelta(hours=2)


class RankLostError(Exception):
    """Another rank died or does not answer, or the network between the ranks failed."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model. All ranks call the collective methods in the same order."""

    rank: int = 0
    count: int = 1
    local: int | None = None  # the rank within this machine, where there are several ranks
    # A process group with a long timeout, for the work before training.
    setup: Any = None

    @property
    def writes(self) -> bool:
        """Whether this rank writes the files and the messages of the run."""
        return self.rank == 0

    @contextmanager
    def in_turns(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on one rank of each other machine, then on the others; then continue."""
        turn = 0 if self.rank == 0 else 1 if self.local == 0 else 2
        several = self.count > 1
        for _ in range(turn if several else 0):
            dist.barrier(self.setup)
        yield
        for _ in range(3 - turn if several else 0):
            dist.barrier(self.setup)

    def from_first(self, value: T) -> T:
        """The value of rank 0."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, group=self.setup)
        return box[0]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag of any rank is set."""
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
        """The module with gradients averaged over the ranks."""
        if self.count == 1:
            return module
        # The layers keep the buffers equal; a broadcast would discard the statistics of the other ranks.
        names = inspect.signature(DistributedDataParallel).parameters
        syncs = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {syncs: False, "device_ids": [device] if device.type == "cuda" else None}
        return DistributedDataParallel(module, **options, gradient_as_bucket_view=True)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn errors of communication into RankLostError.

        Raises:
            RankLostError: another rank cannot be reached.
        """
        try:
            yield
        except RuntimeError as error:
            # Errors of NCCL have their own type, those of gloo do not.
            if self.count > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                reason, *_ = str(error).splitlines()[0].split(". This is typically")
                raise RankLostError(f"rank {self.rank} can no longer reach another rank ({reason})") from error
            raise


def join(device: torch.device, timeout: int) -> Ranks:
    """Initialise torch.distributed if torchrun has started several ranks.

    Args:
        device: the device of this rank.
        timeout: seconds without an answer from another rank after which this rank ends.
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
    """The rank of this process on its machine, or None for a single process."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return int(os.environ["LOCAL_RANK"]) if several else None


def leave(ranks: Ranks) -> None:
    """Leave the process group, after all collective work."""
    if ranks.count > 1:
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End this process; a rank ends without Python's finalization, in which a thread of gloo can abort."""
    if local_rank() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

"""How many levels of a residual quantizer run: quantizer dropout with the random numbers of its source."""

from __future__ import annotations

import random

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ...layers.maps import long_indices

_LARGEST_SEED = 10_000


def draw_seed(device: torch.device | str, max_size: int = _LARGEST_SEED) -> Tensor:
    """A random seed [] that is the same on all ranks, the sum of the seeds of the ranks.

    One process draws it on the CPU, so that no device has to be waited for, unless it is compiled code.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return torch.randint(0, max_size, (), device=device if torch.compiler.is_compiling() else None)
    seed = torch.randint(0, max_size, (), device=device)
    dist.all_reduce(seed)
    return seed


def padded_indices(indices: Tensor, num_levels: int) -> Tensor:
    """Indices [b, ..., n] of the first n levels as int64 of all levels, with -1 for the others.

    Raises:
        ValueError: no integers, or n is not in [1, L].
    """
    indices = long_indices(indices)
    if indices.ndim < 2 or not 1 <= indices.shape[-1] <= num_levels:
        raise ValueError(
            f"expected indices of shape [b, ..., n] with n in [1, {num_levels}], got {tuple(indices.shape)}"
        )
    return pad(indices, (0, num_levels - indices.shape[-1]), value=-1)


class LevelDropout:
    """Draws the number of levels that run in a training step.

    Args:
        num_levels: L.
        cutoff_index: the first level that may be the last one to run, >= 0.
        multiple_of: the number of levels that run is a multiple of this, or L.
    Raises:
        ValueError: cutoff_index is not in [0, L).
    """

    def __init__(self, num_levels: int, cutoff_index: int, multiple_of: int) -> None:
        if not 0 <= cutoff_index < num_levels:
            raise ValueError(
                f"expected quantize_dropout_cutoff_index in [0, {num_levels}), the levels, got {cutoff_index}"
            )
        if multiple_of < 1:
            raise ValueError(f"expected quantize_dropout_multiple_of of at least 1, got {multiple_of}")
        self._num_levels, self._cutoff_index, self._multiple_of = num_levels, cutoff_index, multiple_of

    def levels_to_run(self, device: torch.device, seed: int | Tensor | None) -> int | Tensor:
        """The number of levels that run, or in compiled code these levels, [L] bool; a seed is drawn if it is None."""
        seed = draw_seed(device) if seed is None else seed
        if isinstance(seed, Tensor) and torch.compiler.is_compiling():
            return self.draw_in_graph(seed)
        return self.draw(int(seed))

    def draw(self, seed: int) -> int:
        """The number of levels that run with this seed, in [1, L]."""
        last = random.Random(seed).randrange(self._cutoff_index, self._num_levels)
        return min(self._num_levels, (last // self._multiple_of + 1) * self._multiple_of)

    def draw_in_graph(self, seed: Tensor) -> Tensor:
        """The levels that run with this seed, [L] bool, for compiled code: other levels than those of `draw`."""
        last = self._cutoff_index + seed % (self._num_levels - self._cutoff_index)
        count = (last // self._multiple_of + 1) * self._multiple_of
        return torch.arange(self._num_levels, device=seed.device) < count

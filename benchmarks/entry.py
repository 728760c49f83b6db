"""The words of the benchmark: a size, the inputs drawn for it, a contender, an entry of the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlvae_kernels.testing import NEAR_TIE


class MissingError(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Size:
    """N rows, K codes, D features, k kept codes, of a workload that somebody runs."""

    workload: str
    n: int
    k: int
    d: int
    kept: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return " x ".join(map(str, (self.n, self.k, self.d, *([self.kept] if self.kept > 1 else []))))

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Random inputs of one size; each entry takes from them what it needs."""

    size: Size
    x: Tensor  # [N, D]
    codes: Tensor  # [K, D]
    indices: Tensor  # [N, k] int64
    values: Tensor  # [N, k]
    grad: Tensor  # [N, D], of what comes out

    @property
    def map(self) -> Tensor:
        """The rows as a channel-first map [B, D, h, w], as an encoder gives it: 8 x 8 where N allows it."""
        side = 8 if self.size.n % 64 == 0 else 1
        return to_map(self.x, (self.size.n // side**2, self.size.d, side, side))


def to_map(rows: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Rows [B * h * w, D] as a contiguous map of `shape` [B, D, h, w]."""
    batch, dim, height, width = shape
    return rows.view(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()


def to_rows(map: Tensor) -> Tensor:
    """A map [B, D, h, w] as rows [B * h * w, D]."""
    return map.permute(0, 2, 3, 1).reshape(-1, map.shape[1])


def draw(size: Size, device: torch.device, seed: int = 0, unit: bool = False) -> Inputs:
    """Normal inputs of a size; `unit` gives rows and codes length 1, so that Euclid and cosine find the same codes."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(size.dtype)

    x, codes = normal(size.n, size.d), normal(size.k, size.d)
    if unit:
        x, codes = (torch.nn.functional.normalize(each, dim=1) for each in (x, codes))
    indices = torch.randint(0, size.k, (size.n, size.kept), device=device, generator=generator)
    return Inputs(size, x, codes, indices, normal(size.n, size.kept), normal(size.n, size.d))


@dataclass(frozen=True)
class Call:
    """A contender on its inputs: what is timed, and how its answer is read."""

    forward: Callable[[], Any]
    # From what forward returned to gradients; None: the operation has none.
    backward: Callable[[Any], tuple[Tensor, ...]] | None = None
    # From what forward returned to what the judge takes; not timed.
    answer: Callable[[Any], tuple[Tensor, ...]] = lambda out: out if isinstance(out, tuple) else (out,)

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.backward else ("forward",)

    def run(self, name: str) -> None:
        """The forward, or forward and backward."""
        out = self.forward()
        if name == "backward":
            assert self.backward is not None
            self.backward(out)


# Of inputs, the answer and, where there is a backward, the gradients.
Judge = Callable[[Inputs, tuple[Tensor, ...], "tuple[Tensor, ...] | None", "Tolerance"], "Verdict"]


@dataclass(frozen=True)
class Contender:
    name: str
    # May raise MissingError, or whatever the library raises: the row then says so.
    prepare: Callable[[Inputs], Call]
    precision: str | None = None  # None: that of the inputs
    package: str | None = None  # the distribution whose version stands in the row
    judge: Judge | None = None  # None: that of the entry
    # Its indices must be those of float64 up to float32 rounding, whatever the dtype of the inputs: so must ours.
    exact: bool = False

    def precision_at(self, size: Size) -> str:
        """That of the inputs, but where float32 is computed in another."""
        return self.precision if self.precision and size.dtype == torch.float32 else size.precision


@dataclass(frozen=True)
class Tolerance:
    """What rounding explains."""

    distance: float  # of a squared distance, over the square of the lengths (|x| + |c|)^2
    relative: float  # of other values: the norm of the error over the norm of the exact result


TOLERANCES = {
    "float32": Tolerance(NEAR_TIE, 2e-5),
    "tf32": Tolerance(2.0**-10, 5e-3),
    "float16": Tolerance(2.0**-10, 5e-3),
    "bfloat16": Tolerance(2.0**-7, 3e-2),
}


@dataclass(frozen=True)
class Verdict:
    """How an answer compares with float64."""

    differing: float | None  # share of the indices that are not those of float64; None: it gives no indices
    error: float
    wrong: bool  # beyond what rounding explains


@dataclass(frozen=True)
class Work:
    """The least that must be done: operations of the matrix product, and bytes read and written once."""

    flops: float
    bytes: float


@dataclass(frozen=True, eq=False)
class Entry:
    """An operation or a layer: its sizes, who competes (ours first), and how answers are judged."""

    name: str
    tests: str  # the file that must pass before `verify` believes a time
    ops: tuple[str, ...]  # the operations whose backends ours runs on
    sizes: dict[str, tuple[Size, ...]]  # by device type
    contenders: tuple[Contender, ...]
    judge: Judge
    work: dict[str, Callable[[Size], Work]] = field(default_factory=dict)  # by pass
    unit: bool = False

"""The terms of the benchmarks: size, inputs, call, implementation, verdict, work, and entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlvae_kernels.testing import NEAR_TIE

# The implementation that all others are compared with. It comes first in every entry.
LIBRARY = "dlvae_kernels"


Tensors = tuple[Tensor, ...]


class MissingError(Exception):
    """An implementation cannot run on this machine; the message is the reason."""


@dataclass(frozen=True)
class Size:
    """The size of a workload: N vectors, K codes, D features, and k selected codes for each vector."""

    workload: str
    n: int
    k: int
    d: int
    selected: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return " x ".join(map(str, (self.n, self.k, self.d, *([self.selected] if self.selected > 1 else []))))

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Random inputs of one size. Each entry uses the tensors that it needs."""

    size: Size
    x: Tensor  # [N, D]
    codes: Tensor  # [K, D]
    indices: Tensor  # [N, k] int64
    values: Tensor  # [N, k]
    grad: Tensor  # [N, D], the gradient of the output

    @property
    def map(self) -> Tensor:
        """The vectors as a channel-first feature map [B, D, h, w], with 8 x 8 positions if N is a multiple of 64."""
        side = 8 if self.size.n % 64 == 0 else 1
        return to_map(self.x, (self.size.n // side**2, self.size.d, side, side))


def to_map(vectors: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Vectors [B * h * w, D] as a contiguous map of `shape` [B, D, h, w]."""
    batch, dim, height, width = shape
    return vectors.view(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()


def to_vectors(map: Tensor) -> Tensor:
    """A map [B, D, h, w] as vectors [B * h * w, D]."""
    return map.permute(0, 2, 3, 1).reshape(-1, map.shape[1])


def draw(size: Size, device: torch.device, seed: int = 0, unit: bool = False) -> Inputs:
    """Normally distributed inputs. With `unit`, vectors and codes have length 1: cosine and distance then agree."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(size.dtype)

    x, codes = normal(size.n, size.d), normal(size.k, size.d)
    if unit:
        x, codes = (torch.nn.functional.normalize(each, dim=1) for each in (x, codes))
    indices = torch.randint(0, size.k, (size.n, size.selected), device=device, generator=generator)
    return Inputs(size, x, codes, indices, normal(size.n, size.selected), normal(size.n, size.d))


def _as_tuple(out: Any) -> Tensors:
    return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True)
class Call:
    """An implementation with its inputs. `forward` and `backward` are timed; `answer` and `gradients` are not."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Tensors] | None = None  # takes the result of forward; None: no gradient
    answer: Callable[[Any], Tensors] = _as_tuple  # converts the result of forward for the judge
    gradients: Callable[[Any], Tensors] = _as_tuple  # converts the result of backward for the judge

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.backward else ("forward",)

    def run(self, name: str) -> tuple[Any, Any]:
        """Run the forward pass, or with the name "backward" both passes; the results of the two."""
        out = self.forward()
        return out, self.backward(out) if self.backward and name == "backward" else None

    def judged(self) -> tuple[Tensors, Tensors]:
        """The answer and the gradients (none without a backward pass) of one run."""
        out = self.forward()
        answer = self.answer(out)
        return answer, self.gradients(self.backward(out)) if self.backward else ()


def differentiable(
    forward: Callable[[], Any],
    learned: Sequence[Tensor],
    gradient: Tensor,
    outputs: Callable[[Any], Tensors] = _as_tuple,
    answer: Callable[[Any], Tensors] | None = None,
    gradients: Callable[[Any], Tensors] = _as_tuple,
) -> Call:
    """A call whose backward pass computes the gradients of the tensors `learned`.

    Args:
        gradient: the gradient of each of `outputs` that is no scalar. A scalar output is a loss, with the gradient 1.
        outputs: selects the outputs to differentiate from the result of `forward`.
        answer: selects what the judge takes; None: `outputs`.
    """

    def backward(out: Any) -> Tensors:
        chosen = outputs(out)
        seeds = [torch.ones_like(each) if each.ndim == 0 else gradient.to(each.dtype) for each in chosen]
        return torch.autograd.grad(chosen, learned, seeds)

    return Call(forward, backward, lambda out: tuple(each.detach() for each in (answer or outputs)(out)), gradients)


Prepare = Callable[[Inputs], Call]
# A judge takes the inputs, the answer, the gradients (an empty tuple without a backward pass) and the tolerance.
Judge = Callable[[Inputs, Tensors, Tensors, "Tolerance"], "Verdict"]


@dataclass(frozen=True)
class Implementation:
    """An implementation of an entry: this library, or a baseline."""

    name: str
    prepare: Prepare  # may raise MissingError or any exception of a library; the row then states it
    precision: str | None = None  # None: the precision of the inputs
    package: str | None = None  # the distribution whose version the row states
    judge: Judge | None = None  # None: the judge of the entry

    def precision_at(self, size: Size) -> str:
        """The precision of the inputs, except that float32 inputs may be computed in another precision."""
        return self.precision if self.precision and size.dtype == torch.float32 else size.precision

    def tolerance_at(self, size: Size) -> Tolerance:
        """This library must match float64 within float32 rounding for inputs of every dtype; baselines need not."""
        is_exact = self.name.startswith(LIBRARY) and self.precision is None
        return TOLERANCES["float32" if is_exact else self.precision_at(size)]


@dataclass(frozen=True)
class Tolerance:
    """The largest errors that rounding explains."""

    distance: float  # error of a squared distance, divided by the square of the lengths (|x| + |c|)^2
    relative: float  # other values: norm of the error, divided by the norm of the exact result


TOLERANCES = {
    "float32": Tolerance(NEAR_TIE, 2e-5),
    "tf32": Tolerance(2.0**-10, 5e-3),
    "float16": Tolerance(2.0**-10, 5e-3),
    "bfloat16": Tolerance(2.0**-7, 3e-2),
}


@dataclass(frozen=True)
class Verdict:
    """The comparison of an answer with float64."""

    differing: float | None  # fraction of indices that differ from float64; None: the answer has no indices
    error: float
    wrong: bool  # the error exceeds what rounding explains

    def and_values(self, values: Verdict) -> Verdict:
        """The verdict on indices (self) combined with the verdict on the values at these indices."""
        return Verdict(self.differing, max(self.error, values.error), self.wrong or values.wrong)


@dataclass(frozen=True)
class Work:
    """A lower bound of the work of a pass: the products that it computes, and the tensors that it reads or writes."""

    pairs: int = 0  # products of all N vectors with all K codes
    selected: int = 0  # products of all N vectors with their k selected codes
    vectors: int = 0  # tensors [N, D] in the dtype of the inputs
    codes: int = 0  # tensors [K, D] in the dtype of the inputs
    assigned_codes: int = 0  # tensors [min(N, K), D] in the dtype of the inputs
    values: int = 0  # tensors [N, k] in the dtype of the inputs
    indices: int = 0  # tensors [N, k] of int64
    float32_values: int = 0  # tensors [N, k] of float32
    float32_codes: int = 0  # tensors [K, D] of float32
    float32_one_hot: int = 0  # tensors [N, K] of float32

    def flops(self, s: Size) -> float:
        return 2.0 * s.n * s.d * (self.pairs * s.k + self.selected * s.selected)

    def bytes(self, s: Size) -> float:
        selected = s.n * s.selected
        features = s.d * (self.vectors * s.n + self.codes * s.k + self.assigned_codes * min(s.n, s.k))
        float32 = self.float32_values * selected + self.float32_codes * s.k * s.d + self.float32_one_hot * s.n * s.k
        return s.dtype.itemsize * (features + self.values * selected) + 8 * self.indices * selected + 4 * float32


@dataclass(frozen=True, eq=False)
class Entry:
    """An operation or a layer: its sizes, its implementations (this library first), and how answers are judged."""

    name: str
    tests: str  # the test file that must pass before `verify` measures
    ops: tuple[str, ...]  # the operations whose backends this library uses
    sizes: dict[str, tuple[Size, ...]]  # by device type
    implementations: tuple[Implementation, ...]
    judge: Judge
    work: dict[str, Work] = field(default_factory=dict)  # by pass
    unit: bool = False  # draw vectors and codes of length 1

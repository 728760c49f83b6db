"""The terms of the benchmarks: implementation, signature, tolerance, verdict, work, and entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from dlvae_kernels.testing import NEAR_TIE

from .calls import Call, Prepare, Tensors, compiled, differentiable, in_cuda_cpp
from .inputs import Inputs, Size

# The implementation that all others are compared with. It comes first in every entry.
LIBRARY = "dlvae_kernels"
CUDA_CPP = f"{LIBRARY}, CUDA C++"


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

    def cells(self) -> dict[str, str]:
        """The cells of a row that state the verdict."""
        return {"error": f"{self.error:.2g}", "status": "wrong" if self.wrong else "ok"}

    def and_values(self, values: Verdict) -> Verdict:
        """The verdict on indices (self) combined with the verdict on the values at these indices."""
        return Verdict(self.differing, max(self.error, values.error), self.wrong or values.wrong)


# A judge takes the inputs, the answer, the gradients (an empty tuple without a backward pass) and the tolerance.
Judge = Callable[[Inputs, Tensors, Tensors, Tolerance], Verdict]


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
        return self.precision if self.precision and size.precision == "float32" else size.precision

    def tolerance_at(self, size: Size) -> Tolerance:
        """This library must match float64 within float32 rounding for inputs of every dtype; baselines need not."""
        is_exact = self.name.startswith(LIBRARY) and self.precision is None
        return TOLERANCES["float32" if is_exact else self.precision_at(size)]


def _at(positions: tuple[int, ...], out: Any) -> Tensors:
    return tuple((out,)[i] if isinstance(out, Tensor) else out[i] for i in positions)


@dataclass(frozen=True)
class Signature:
    """How the implementations of an operation are called. A signature turns a function into `prepare`."""

    arguments: Callable[[Inputs], tuple[Any, ...]]
    learned: tuple[int, ...] = ()  # positions of the arguments that get gradients
    gradient: Callable[[Inputs], Tensor] = lambda inputs: inputs.grad
    outputs: tuple[int, ...] = (0,)  # positions of the outputs to differentiate
    answer: tuple[int, ...] | None = None  # positions of the outputs that the judge takes; None: `outputs`

    def __call__(self, function: Callable[..., Any]) -> Prepare:
        return partial(self._prepare, function)

    def _prepare(self, function: Callable[..., Any], inputs: Inputs) -> Call:
        arguments = [*self.arguments(inputs)]
        if not self.learned:
            return Call(lambda: function(*arguments))
        for i in self.learned:
            arguments[i] = arguments[i].clone().requires_grad_()
        return differentiable(
            lambda: function(*arguments),
            [arguments[i] for i in self.learned],
            self.gradient(inputs),
            partial(_at, self.outputs),
            partial(_at, self.answer or self.outputs),
        )

    def library(self, function: Callable[..., Any]) -> tuple[Implementation, Implementation]:
        """This library with the backend that it selects, and with the CUDA C++ kernels (a GPU prefers Triton's)."""
        return self.plain(LIBRARY, function), Implementation(CUDA_CPP, partial(in_cuda_cpp, self(function)))

    def plain(self, name: str, function: Callable[..., Any]) -> Implementation:
        return Implementation(name, self(function))

    def compiled(self, function: Callable[..., Any]) -> Implementation:
        return Implementation("torch.compile", lambda inputs: self(compiled(function))(inputs))

    def chosen(self, name: str, choose: Callable[[Inputs], Callable[..., Any]], **options: Any) -> Implementation:
        """An implementation whose function `choose` selects, which may raise MissingError."""
        return Implementation(name, lambda inputs: self(choose(inputs))(inputs), **options)


@dataclass(frozen=True)
class Work:
    """A lower bound of the work of a pass: the products that it computes, and the tensors that it reads or writes."""

    pairs: int = 0  # products of all N vectors with all K codes
    level_pairs: int = 0  # products of all N vectors with all K codes of each of k levels
    selected: int = 0  # products of all N vectors with their k selected codes
    vectors: int = 0  # tensors [N, D] in the dtype of the inputs
    codes: int = 0  # tensors [K, D] in the dtype of the inputs
    level_codes: int = 0  # tensors [k, K, D] in the dtype of the inputs
    assigned_codes: int = 0  # tensors [min(N, K), D] in the dtype of the inputs
    values: int = 0  # tensors [N, k] in the dtype of the inputs
    indices: int = 0  # tensors [N, k] of int64
    float32_values: int = 0  # tensors [N, k] of float32
    float32_codes: int = 0  # tensors [K, D] of float32
    float32_one_hot: int = 0  # tensors [N, K] of float32

    def flops(self, s: Size) -> float:
        pairs = self.pairs * s.k + self.level_pairs * s.k * s.selected
        return 2.0 * s.n * s.d * (pairs + self.selected * s.selected)

    def bytes(self, s: Size) -> float:
        selected = s.n * s.selected
        codes = self.codes * s.k + self.level_codes * s.k * s.selected + self.assigned_codes * min(s.n, s.k)
        features = s.d * (self.vectors * s.n + codes)
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
    forward: Work | None = None
    backward: Work | None = None
    unit: bool = False  # draw vectors and codes of length 1

    @property
    def work(self) -> dict[str, Work]:
        """The work of each pass; a pass without an entry has no lower bound."""
        return {name: work for name, work in (("forward", self.forward), ("backward", self.backward)) if work}

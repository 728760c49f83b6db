"""The target speed-ups, peak memory and overheads, on a GPU and on two CPU cores, checked against measured rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from . import sizes
from .entry import CUDA_CPP, LIBRARY
from .inputs import Size
from .layers import NOTEBOOK
from .results import Row
from .sizes import half

_LUCIDRAINS = "vector-quantize-pytorch"


@dataclass(frozen=True)
class Speed:
    """This library is at least `factor` times as fast as a baseline, in one pass or in all passes together."""

    op: str
    size: Size
    baseline: str
    factor: float
    only: str | None = None  # "forward" or "backward"
    own: str = LIBRARY  # or CUDA_CPP

    def __str__(self) -> str:
        name = " ".join(filter(None, (self.op, self.only, self.own.removeprefix(LIBRARY).strip(", "))))
        return f"{name} at {self.size} {self.size.precision}: {self.factor:g}x as fast as {self.baseline}"

    def outcome(self, rows: Iterable[Row]) -> tuple[bool, str] | None:
        """Whether the target is reached, and the times; None if one of the two has no valid time."""
        own, baseline = (_milliseconds(rows, self, name) for name in (self.own, self.baseline))
        if own is None or baseline is None:
            return None
        return baseline >= self.factor * own, f"{baseline / own:.2f}x: {own:.4g} ms and {baseline:.4g} ms"


@dataclass(frozen=True)
class Most:
    """The largest value of a column in the rows of this library is at most `most`."""

    op: str
    size: Size
    column: str
    most: float
    text: str

    def __str__(self) -> str:
        return f"{self.op} at {self.size}: at most {self.most:g} {self.text}"

    def outcome(self, rows: Iterable[Row]) -> tuple[bool, str] | None:
        """Whether the target is reached, and the value; None if it was not measured."""
        valid = (row for row in _selected(rows, self, LIBRARY) if row["status"] == "ok" and row.get(self.column))
        found = [float(row[self.column]) for row in valid]
        return (max(found) <= self.most, f"{max(found):.4g}") if found else None


Target = Speed | Most


def _speeds(op: str, factors: Mapping[str, float], *where: Size, only: str | None = None) -> list[Target]:
    """A target for each size and each baseline, given with its factor."""
    return [Speed(op, size, name, factor, only) for size in where for name, factor in factors.items()]


# The CUDA C++ kernels are compared with the plain PyTorch that users would write, and with Triton's kernels.
_CUDA_CPP = (
    ("nearest_code", sizes.WIDE, "plain PyTorch"),
    ("topk_codes", sizes.DICTIONARY, "plain PyTorch"),
    ("one_hot", sizes.CIFAR, "F.one_hot"),
    ("gather_codes", sizes.VQVAE2, "F.embedding"),
    ("vector_quantize", sizes.WIDE, "plain PyTorch"),
    ("ema_update", sizes.VQVAE2, "one-hot matmul"),
    ("sparse_decode", sizes.DICTIONARY, "dense matmul"),
    ("kept_softmax", sizes.DICTIONARY, "plain PyTorch"),
)
_SEARCH = {"plain PyTorch": 6, "torch.compile": 3, "flash-kmeans": 1}
_UPDATE = {"one-hot matmul": 3, "index_add_": 2}
_CUDA: tuple[Target, ...] = (
    *_speeds("nearest_code", _SEARCH, sizes.GROWTH["cuda"][0], sizes.WIDE),
    *_speeds("nearest_code", {"flash-kmeans": 1.5}, half(sizes.WIDE), half(sizes.KMEANS)),
    *_speeds("topk_codes", {"plain PyTorch": 3}, sizes.DICTIONARY, sizes.SAE),
    *_speeds("topk_codes dot", {"plain PyTorch": 3}, sizes.DICTIONARY, sizes.SAE),
    *_speeds("ema_update", _UPDATE, sizes.CIFAR, sizes.VQVAE2, sizes.VQGAN, sizes.KMEANS),
    *_speeds("sparse_decode", {"sparsify": 1}, sizes.DICTIONARY, sizes.SAE, only="forward"),
    *_speeds("sparse_decode", {"sparsify": 2}, sizes.DICTIONARY, sizes.SAE, only="backward"),
    *_speeds("VectorQuantizerEMA", {_LUCIDRAINS: 10}, sizes.CIFAR, sizes.VQGAN),
    *_speeds("DictionaryLearning", {NOTEBOOK: 4}, sizes.DICTIONARY),
    *_speeds("SparseAutoencoder", {"sparsify": 2}, sizes.SAE),
    *(Speed(op, size, plain, 1.5, own=CUDA_CPP) for op, size, plain in _CUDA_CPP),
    *(Speed(op, size, LIBRARY, 0.5, own=CUDA_CPP) for op, size, _ in _CUDA_CPP),
    Most("nearest_code", sizes.LARGEST, "peak_mb", 200, "MB beyond the inputs"),
)
_CPU: tuple[Target, ...] = (
    *_speeds("nearest_code", {"faiss-cpu": 1.5, "plain PyTorch": 5}, sizes.CIFAR),
    *_speeds("nearest_code", {"faiss-cpu": 1.5, "plain PyTorch": 2.5}, sizes.FEATURES),
    *_speeds("nearest_code", {"faiss-cpu": 1.5, "plain PyTorch": 3}, sizes.WIDE_SMALL),
    *_speeds("nearest_code", {"faiss-cpu": 1.2, "plain PyTorch": 25}, sizes.FINE),
    *_speeds("VectorQuantizerEMA", {_LUCIDRAINS: 12}, sizes.CIFAR),
    *_speeds("VectorQuantizerEMA", {_LUCIDRAINS: 50}, sizes.FINE),
    *_speeds("VectorQuantizerEMA eval", {_LUCIDRAINS: 12}, sizes.CIFAR, sizes.FINE),
    *_speeds("DictionaryLearning", {NOTEBOOK: 3}, sizes.DICTIONARY),
    *_speeds("ResidualVectorQuantizer", {_LUCIDRAINS: 8}, sizes.ENCODEC_LEVELS),
    *_speeds("ResidualVectorQuantizer eval", {_LUCIDRAINS: 5}, sizes.ENCODEC_LEVELS),
    *_speeds("ResidualVectorQuantizer eval", {_LUCIDRAINS: 10}, sizes.MIMI_LEVELS),
    *_speeds("VectorQuantizerEMA heads", {_LUCIDRAINS: 40}, sizes.HEADS),
    *_speeds("VectorQuantizerEMA heads eval", {_LUCIDRAINS: 40}, sizes.HEADS),
    Most("VectorQuantizerEMA heads", sizes.HEADS, "peak_mb", 40, "MB beyond the inputs"),
    Most("LookupFreeQuantizer", sizes.BITS_14, "peak_mb", 100, "MB beyond the inputs"),
)
_LATENCY: tuple[Target, ...] = (
    Most("nearest_code", sizes.ONE_VECTOR, "over_us", 12, "us longer than the native operation"),
    Most("gather_codes", sizes.CIFAR, "over_us", 0, "us longer than F.embedding"),
)
# The targets of each device type, and of `python -m benchmarks latency`.
TARGETS = {"cpu": _CPU, "cuda": _CUDA, "latency": _LATENCY}


def check(rows: list[Row], kind: str) -> list[str]:
    """A line for each target of a kind: reached, MISSED or not measured, with the measured values."""
    lines = []
    for target in TARGETS[kind]:
        if (outcome := target.outcome(rows)) is None:
            lines.append(f"not measured: {target}")
        else:
            lines.append(f"{'reached' if outcome[0] else 'MISSED'}: {target} ({outcome[1]})")
    return lines


def _selected(rows: Iterable[Row], target: Target, implementation: str) -> list[Row]:
    wanted = (target.op, str(target.size), implementation)
    # The row of an implementation that computes float32 inputs in tf32 says so.
    precisions = ("float32", "tf32") if target.size.precision == "float32" else (target.size.precision,)
    found = [row for row in rows if (row["op"], row["size"], row["implementation"]) == wanted]
    return [row for row in found if row["precision"] in precisions]


def _milliseconds(rows: Iterable[Row], speed: Speed, implementation: str) -> float | None:
    """The sum over the passes. A size that is in the registry twice counts with the median of its times."""
    times: dict[str, list[float]] = {}
    for row in _selected(rows, speed, implementation):
        if row["status"] != "ok":
            return None
        if speed.only in (None, row["pass"]):
            times.setdefault(row["pass"], []).append(float(row["ms"]))
    return sum(statistics.median(each) for each in times.values()) if times else None

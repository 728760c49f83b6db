"""What the kernels are to reach, on a GPU and on two CPU cores, held against the rows that a run measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .entry import Size
from .results import Row
from .sizes import (
    CIFAR,
    DICTIONARY,
    FEATURES,
    FINE,
    GROWTH,
    KMEANS,
    LARGEST,
    SAE,
    VQGAN,
    VQVAE2,
    WIDE,
    WIDE_SMALL,
    half,
)

OURS = "dlvae_kernels"
CUDA_CPP = "dlvae_kernels, CUDA C++"
_MIDDLE = GROWTH["cuda"][0]


@dataclass(frozen=True)
class Speed:
    """Ours is `least` times as fast as a contender, in one pass or in all together."""

    op: str
    size: Size
    contender: str
    least: float
    only: str | None = None  # "forward" or "backward"
    ours: str = OURS

    def __str__(self) -> str:
        what = " ".join(filter(None, (self.op, self.only, self.ours.removeprefix(OURS).strip(", "))))
        return f"{what} at {self.size} {self.size.precision}: {self.least:g}x as fast as {self.contender}"

    def reached(self, rows: Iterable[Row]) -> tuple[bool, str] | None:
        """Whether it is held, and the figures; None where one of the two was not measured right."""
        mine, theirs = (
            _milliseconds(rows, self.op, self.size, name, self.only) for name in (self.ours, self.contender)
        )
        if mine is None or theirs is None:
            return None
        return theirs >= self.least * mine, f"{theirs / mine:.2f}x: {mine:.4g} ms against {theirs:.4g} ms"


@dataclass(frozen=True)
class Memory:
    """Ours takes less than `most` MB beyond the inputs."""

    op: str
    size: Size
    most: float

    def __str__(self) -> str:
        return f"{self.op} at {self.size}: less than {self.most:g} MB"

    def reached(self, rows: Iterable[Row]) -> tuple[bool, str] | None:
        """Whether it is held, and the figure; None where it was not measured."""
        found = [float(row["peak_mb"]) for row in _of(rows, self.op, self.size, OURS) if row.get("peak_mb")]
        return (max(found) < self.most, f"{max(found):.4g} MB") if found else None


Target = Speed | Memory

# Each operation, and what one would write in plain PyTorch.
_PLAIN = (
    ("nearest_code", WIDE, "plain PyTorch"),
    ("topk_codes", DICTIONARY, "plain PyTorch"),
    ("one_hot", CIFAR, "F.one_hot"),
    ("gather_codes", VQVAE2, "F.embedding"),
    ("vector_quantize", WIDE, "plain PyTorch"),
    ("ema_update", VQVAE2, "one-hot matmul"),
    ("sparse_decode", DICTIONARY, "dense matmul"),
    ("kept_softmax", DICTIONARY, "plain PyTorch"),
)

_CUDA: tuple[Target, ...] = (
    *(
        Speed("nearest_code", size, name, least)
        for size in (_MIDDLE, WIDE)
        for name, least in (("plain PyTorch", 6), ("torch.compile", 3), ("flash-kmeans", 1))
    ),
    *(Speed("nearest_code", half(size), "flash-kmeans", 1.5) for size in (WIDE, KMEANS)),
    *(
        Speed("ema_update", size, name, least)
        for size in (CIFAR, VQVAE2, VQGAN, KMEANS)
        for name, least in (("one-hot matmul", 3), ("index_add_", 2))
    ),
    Speed("VectorQuantizerEMA", CIFAR, "vector-quantize-pytorch", 10),
    Speed("VectorQuantizerEMA", VQGAN, "vector-quantize-pytorch", 10),
    *(Speed(op, size, "plain PyTorch", 3) for op in ("topk_codes", "topk_codes dot") for size in (DICTIONARY, SAE)),
    *(Speed("sparse_decode", size, "sparsify", 1, "forward") for size in (DICTIONARY, SAE)),
    *(Speed("sparse_decode", size, "sparsify", 2, "backward") for size in (DICTIONARY, SAE)),
    Speed("DictionaryLearning", DICTIONARY, "notebook", 4),
    Speed("SparseAutoencoder", SAE, "sparsify", 2),
    Memory("nearest_code", LARGEST, 200),
    *(Speed(op, size, plain, 1.5, ours=CUDA_CPP) for op, size, plain in _PLAIN),
    *(Speed(op, size, OURS, 0.5, ours=CUDA_CPP) for op, size, _ in _PLAIN),
)

_CPU: tuple[Target, ...] = (
    *(Speed("nearest_code", size, "faiss-cpu", 1.5) for size in (CIFAR, FEATURES, WIDE_SMALL)),
    Speed("nearest_code", FINE, "faiss-cpu", 1.2),
    *(
        Speed("nearest_code", size, "plain PyTorch", least)
        for size, least in ((CIFAR, 5), (FEATURES, 2.5), (WIDE_SMALL, 3), (FINE, 25))
    ),
    Speed("VectorQuantizerEMA", CIFAR, "vector-quantize-pytorch", 12),
    Speed("VectorQuantizerEMA", FINE, "vector-quantize-pytorch", 50),
    *(Speed("VectorQuantizerEMA eval", size, "vector-quantize-pytorch", 12) for size in (CIFAR, FINE)),
    Speed("DictionaryLearning", DICTIONARY, "notebook", 3),
)

TARGETS = {"cpu": _CPU, "cuda": _CUDA}


def check(rows: list[Row], device: str) -> list[str]:
    """A line for each target of a type of device: held, missed or not measured, with the figures."""
    lines = []
    for target in TARGETS[device]:
        outcome = target.reached(rows)
        if outcome is None:
            lines.append(f"not measured: {target}")
        else:
            held, figures = outcome
            lines.append(f"{'held' if held else 'MISSED'}: {target} ({figures})")
    return lines


def _of(rows: Iterable[Row], op: str, size: Size, contender: str) -> list[Row]:
    wanted = {"op": op, "size": str(size), "contender": contender}
    # A contender that computes float32 in a precision of its own says so in its row.
    precisions = {"float32", "tf32"} if size.precision == "float32" else {size.precision}
    return [
        row
        for row in rows
        if all(row.get(key) == value for key, value in wanted.items()) and row.get("precision") in precisions
    ]


def _milliseconds(rows: Iterable[Row], op: str, size: Size, contender: str, only: str | None) -> float | None:
    """Of all passes or one; the median where a size stands in the registry twice."""
    times: dict[str, list[float]] = {}
    for row in _of(rows, op, size, contender):
        if row.get("status") != "ok":
            return None
        if only in (None, row["pass"]):
            times.setdefault(row["pass"], []).append(float(row["ms"]))
    return sum(statistics.median(each) for each in times.values()) if times else None

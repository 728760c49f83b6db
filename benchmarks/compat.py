"""The quantizers of dlvae_kernels.compat.vector_quantize_pytorch and their originals, from equal state in one process.

Rows:

- pass: "train" is the forward and the backward of (quantized * random numbers).sum() + losses.sum() with the gradients
  of the input and of all parameters; "eval" is the forward without gradients.
- operations, host_reads: of one pass. An operation is a dispatched operation of torch that is not a view, or one
  operation of dlvae_kernels. A host read would wait for a GPU. Those of the flag `initted` of this library do not
  count, because it reads the flag only where it lies in CPU memory.
- differing: fraction of vectors with an index that differs from the original's. status "wrong": an index differs by
  more than a near tie, or a quantized vector or a gradient by more than rounding.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from dlvae_kernels.backends import native
from dlvae_kernels.compat import vector_quantize_pytorch as own_classes

from . import baselines, measure, memory, results
from .entry import LIBRARY, TOLERANCES, Verdict
from .results import Row

PATH = results.FOLDER / "compat-cpu.csv"
VQP = "vector-quantize-pytorch"
# ms and ratio as in results.COLUMNS: ratio is the time divided by that of this library.
COLUMNS = (
    *("quantizer", "options", "pass", "size", "implementation", "ms", "ms_p20", "ms_p80", "ratio", "ratio_p20"),
    *("ratio_p80", "peak_mb", "operations", "host_reads", "differing", "error", "status", "instruction_set"),
    *("device", "threads", "versions", "commit"),
)
_MIN_ROUNDS, _MAX_ROUNDS = 3, 41
# Values behind a near tie at the last of many levels, and sums of losses of many terms.
_MOST_DIFFERING, _RELATIVE = 0.02, 1e-4


@dataclass(frozen=True)
class Case:
    """A quantizer with options, inputs of a shape and the passes to measure."""

    quantizer: str
    shape: tuple[int, ...]
    sizes: dict[str, Any]  # arguments that determine the size
    options: dict[str, Any] = field(default_factory=dict)
    passes: tuple[str, ...] = ("train", "eval")
    seed: int = 0

    @property
    def text(self) -> str:
        """The options as they are written in Python."""
        return ", ".join(f"{key}={value}" for key, value in self.options.items())

    @property
    def name(self) -> str:
        return f"{self.quantizer} {self.text}".strip()

    @property
    def size(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return ", ".join([shape, *(f"{key}={value}" for key, value in self.sizes.items())])

    @property
    def is_map(self) -> bool:
        """Whether the inputs are [B, D, H, W]."""
        return len(self.shape) == 4

    @property
    def num_vectors(self) -> int:
        return math.prod(self.shape) // self.shape[1 if self.is_map else -1]

    @property
    def is_search(self) -> bool:
        """Whether the nearest code is searched for in a codebook."""
        return self.quantizer.endswith("VQ") or self.quantizer == "VectorQuantize"


_SPEECH = (64, 75, 128)
_K = {"dim": 128, "codebook_size": 1024}
_LEVELS = {**_K, "num_quantizers": 8}
CASES = (
    Case("VectorQuantize", _SPEECH, _K),
    Case("VectorQuantize", _SPEECH, _K, {"use_cosine_sim": True}),
    Case("VectorQuantize", _SPEECH, _K, {"threshold_ema_dead_code": 2}),
    Case("VectorQuantize", _SPEECH, {**_K, "codebook_dim": 16, "heads": 8}, {"separate_codebook_per_head": True}),
    Case("VectorQuantize", (8, 256, 32, 32), {"dim": 256, "codebook_size": 1024}, {"accept_image_fmap": True}),
    Case("ResidualVQ", _SPEECH, _LEVELS),
    Case("ResidualVQ", _SPEECH, _LEVELS, {"rotation_trick": False}),
    Case("ResidualVQ", _SPEECH, _LEVELS, {"threshold_ema_dead_code": 2}),
    Case("ResidualVQ", _SPEECH, _LEVELS, {"shared_codebook": True}),
    Case("ResidualVQ", _SPEECH, _LEVELS, {"use_cosine_sim": True}),
    # With the seed 0 the one vector is a near tie, after which nothing can be compared.
    Case(
        "ResidualVQ", (1, 1, 256), {"dim": 256, "codebook_size": 2048, "num_quantizers": 32}, passes=("eval",), seed=1
    ),
    Case("GroupedResidualVQ", _SPEECH, {**_LEVELS, "groups": 2}),
    Case("FSQ", _SPEECH, {"levels": [8, 5, 5, 5], "dim": 128}),
    Case("ResidualFSQ", _SPEECH, {"levels": [5] * 4, "num_quantizers": 8, "dim": 128}),
    Case("GroupedResidualFSQ", _SPEECH, {"levels": [5] * 4, "num_quantizers": 8, "dim": 128, "groups": 2}),
    Case("LFQ", (64, 75, 10), {"codebook_size": 2**10}),
    Case("LFQ", (64, 75, 14), {"codebook_size": 2**14}),
    Case("ResidualLFQ", (64, 75, 8), {"dim": 8, "codebook_size": 2**8, "num_quantizers": 4}),
    Case("GroupedResidualLFQ", (64, 75, 16), {"dim": 16, "codebook_size": 2**8, "num_quantizers": 4, "groups": 2}),
    Case("SimVQ", _SPEECH, _K),
    Case("ResidualSimVQ", _SPEECH, {**_K, "num_quantizers": 4}),
    Case("RandomProjectionQuantizer", _SPEECH, {**_K, "codebook_dim": 16, "num_codebooks": 4}, passes=("eval",)),
)


class Operations(TorchDispatchMode):
    """While active, count operations and host reads, but for reads of tensors at the `ignored` addresses."""

    def __init__(self, ignored: Collection[int] = ()) -> None:
        super().__init__()
        self.count, self.reads = 0, 0
        self._ignored = ignored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_read = func is torch.ops.aten._local_scalar_dense.default
        self.reads += is_read and args[0].data_ptr() not in self._ignored
        # promote_types takes and returns dtypes.
        self.count += not (is_read or func.is_view or func is torch.ops.aten.promote_types.default)
        return func(*args, **(kwargs or {}))


class Quantizer:
    """A quantizer of a library with the inputs of a case."""

    def __init__(self, case: Case, library: str) -> None:
        torch.manual_seed(case.seed)
        classes = own_classes if library == LIBRARY else baselines.library("vector_quantize_pytorch")
        self.module: nn.Module = getattr(classes, case.quantizer)(**case.sizes, **case.options)
        self.x, self.weights = torch.randn(case.shape), torch.randn(case.shape)

    def run(self, name: str) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The outputs of a pass, and the gradient of the input."""
        if self.module.training != (name == "train"):
            self.module.train(name == "train")
        if name == "eval":
            with torch.no_grad():
                outputs = self.module(self.x)
            return (outputs,) if isinstance(outputs, Tensor) else outputs, None
        x = self.x.detach().requires_grad_()
        quantized, *others = outputs = self.module(x)
        losses = [each.sum() for each in others if each.is_floating_point() and each.requires_grad]
        leaves = [x, *(each for each in self.module.parameters() if each.requires_grad)]
        total = sum(losses, (quantized * self.weights).sum())
        return outputs, torch.autograd.grad(total, leaves, allow_unused=True)[0]


def quantizers(case: Case) -> dict[str, Quantizer]:
    """The quantizer of each library, with equal state."""
    pair = {name: Quantizer(case, name) for name in (LIBRARY, VQP)}
    load_state(pair, copied_state(pair))
    return pair


def copied_state(pair: dict[str, Quantizer]) -> dict[str, Tensor]:
    """A copy of the state of the stock quantizer."""
    return {key: value.clone() for key, value in pair[VQP].module.state_dict().items()}


def load_state(pair: dict[str, Quantizer], state: dict[str, Tensor]) -> None:
    """Load a state into both quantizers, strictly."""
    for each in pair.values():
        each.module.load_state_dict(state, strict=True)


def operations(quantizer: Quantizer, library: str, name: str) -> Operations:
    """The operations and host reads of a pass."""
    named = quantizer.module.named_buffers()
    flags = {value.data_ptr() for key, value in named if key.endswith("initted") and library == LIBRARY}
    with Operations(flags) as found:
        quantizer.run(name)
    return found


def judge(case: Case, pair: dict[str, Quantizer], name: str) -> Verdict:
    """Run a pass of both quantizers and compare indices, quantized vectors and gradients; the state stays as it is.

    Where codes are searched for, an index may differ at a near tie, and the other values of its vector are left out.
    """
    own, stock = pair.values()
    state = copied_state(pair)
    (actual, gradient), (expected, expected_gradient) = own.run(name), stock.run(name)
    load_state(pair, state)
    if len(actual) == 1:
        differing = float((actual[0] != expected[0]).double().mean())
        return Verdict(differing, 0.0, differing > 0)
    indices, others = (_by_vector(case, each[1]) for each in (actual, expected))
    is_equal = (indices == others).all(1)
    differing = float((~is_equal).double().mean())
    compared, excess = torch.ones_like(is_equal), 0.0
    if case.is_search:
        compared, excess = is_equal, _excess(case, own, actual[1], expected[1])
    values = [(actual[0], expected[0])] + ([] if gradient is None else [(gradient, expected_gradient)])
    errors = [_error(*(_by_vector(case, each)[compared] for each in value)) for value in values]  # type: ignore[arg-type]
    wrong = excess > TOLERANCES["float32"].distance or differing > _MOST_DIFFERING or not max(errors) <= _RELATIVE
    return Verdict(differing, max(errors), wrong)


def _by_vector(case: Case, values: Tensor) -> Tensor:
    """Features or indices as [N, ...]."""
    if not values.is_floating_point():
        values = values.movedim(0, -1) if "groups" in case.sizes else values
    elif case.is_map:
        values = values.movedim(1, -1)
    return values.reshape(case.num_vectors, -1)


def _excess(case: Case, own: Quantizer, actual: Tensor, expected: Tensor) -> float:
    """How much farther the codes at the actual indices are than those at the expected ones, where they first differ.

    It is a difference of squared distances, divided by the squared lengths (|x| + |c|)^2.
    """
    module: Any = own.module
    decode = module.indices_to_codes if case.quantizer == "SimVQ" else module.get_codes_from_indices
    groups, levels = (case.sizes.get(name, 1) for name in ("groups", "num_quantizers"))
    x = _by_vector(case, own.x).double().unflatten(1, (groups, -1)).movedim(1, 0)[:, None]
    codes, others = (
        (each.movedim(1, -1) if case.is_map else each).reshape(groups, levels, *x.shape[2:]).double()
        for each in (decode(actual).detach(), decode(expected).detach())
    )
    residual = x - (others.cumsum(1) - others)
    if case.options.get("use_cosine_sim"):
        residual = normalize(residual, dim=-1)
    lengths = (residual.norm(dim=-1) + others.norm(dim=-1)).square()
    excess = ((residual - codes).square().sum(-1) - (residual - others).square().sum(-1)) / lengths
    differs = (codes != others).any(-1)
    is_first = differs & (differs.cumsum(1) == 1)
    return float(excess[is_first].max()) if is_first.any() else 0.0


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm().clamp(min=1e-30))


def _times(pair: dict[str, Quantizer], name: str, budget: float) -> dict[str, list[float]]:
    """Seconds of a pass in turns, by library. All rounds begin with the same state."""
    found: dict[str, list[float]] = {library: [] for library in pair}
    state = copied_state(pair)
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for number in range(_MAX_ROUNDS):
            if number >= _MIN_ROUNDS and time.perf_counter() - begin > budget:
                break
            load_state(pair, state)
            # Each goes first in every other round.
            for library in list(pair)[:: 1 if number % 2 else -1]:
                start = time.perf_counter()
                pair[library].run(name)
                found[library].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return found


def _peaks(case: Case, library: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    quantizer = Quantizer(case, library)
    found = {}
    for name in case.passes:
        quantizer.run(name)
        found[name] = memory.growth(partial(quantizer.run, name))
    return found


def measured(case: Case, seconds: float) -> list[Row]:
    """The rows of a case."""
    measure.keep_freed_memory()
    pair = quantizers(case)
    peaks = {
        library: memory.in_child(_peaks, (case, library, torch.get_num_threads()), f"{library}, {case.name}")
        for library in pair
    }
    table, state = [], copied_state(pair)
    for name in case.passes:
        load_state(pair, state)
        verdict = judge(case, pair, name)
        times = _times(pair, name, seconds)
        for library, quantizer in pair.items():
            counted = operations(quantizer, library, name)
            pairs = zip(times[library], times[LIBRARY], strict=True)
            table.append(
                {
                    "quantizer": case.quantizer,
                    "options": case.text,
                    "pass": name,
                    "size": case.size,
                    "implementation": library,
                    **measure.spread("ms", [1e3 * each for each in times[library]], ".4g"),
                    **measure.spread("ratio", [each / own for each, own in pairs], ".3f"),
                    "peak_mb": f"{peaks[library][name]:.1f}",
                    "operations": str(counted.count),
                    "host_reads": str(counted.reads),
                    "differing": f"{verdict.differing:.2g}",
                    **verdict.cells(),
                    "instruction_set": native.instruction_set() if native.instruction_sets() else "",
                    "package": None if library == LIBRARY else VQP,
                }
            )
    return results.completed(table, torch.device("cpu"))


def write(path: Path, only: str | None, seconds: float, cases: Sequence[Case] = CASES) -> int:
    """Measure cases into a CSV file. Returns 1 if a result is wrong.

    Args:
        only: part of the quantizers and options to measure, such as "ResidualVQ" or "cosine"; None: all.
        seconds: time of the rounds of a pass.
    Raises:
        ValueError: no case has this name.
    """
    chosen = [case for case in cases if only is None or only.lower() in case.name.lower()]
    if not chosen:
        raise ValueError(f"expected only to be part of one of {', '.join(case.name for case in cases)}; got {only!r}")
    status = 0
    with results.writing(path, COLUMNS) as add:
        for case in chosen:
            rows = measured(case, seconds)
            add(rows)
            for row in rows:
                status |= row["status"] != "ok"
                print(_line(row), flush=True)
    return status


def _line(row: Row) -> str:
    """A row formatted for the terminal."""
    name = f"{row['quantizer']:<18} {row['options']:<32} {row['pass']:<5} {row['implementation']:<23}"
    counts = f"{row['operations']:>5} operations {row['host_reads']:>3} reads {row['peak_mb']:>7} MB"
    return f"{name} {row['ms']:>8} ms  ratio {row['ratio']:>7} {counts}  {row['status']}, {row['differing']} differ"

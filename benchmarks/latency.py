"""The overhead of a call on the CPU, in microseconds: a public function and its baseline in turns in one process.

The baseline of nearest_code is the native operation below it, at a size where its work takes almost no time. That of
gather_codes is the function of torch with the same result. Neither computes a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding

import dlvae_kernels as dlvae
from dlvae_kernels.backends import native

from . import judge, measure, results, run, sizes, targets
from .calls import MissingError
from .entry import LIBRARY, Entry, Signature
from .inputs import Inputs, Size

PATH = results.FOLDER / "latency-cpu.csv"
# us: time of a call. over_us: time minus the time of the baseline in the same round. Both as median, 20th and 80th
# percentile.
COLUMNS = (
    *("op", "size", "implementation", "backend", "instruction_set", "precision", "us", "us_p20", "us_p80"),
    *("over_us", "over_us_p20", "over_us_p80", "error", "status", "device", "threads", "versions", "commit"),
)
_CPU = torch.device("cpu")


def _native_search(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    if (reason := native.unavailable_reason("nearest_code", inputs.x)) is not None:
        raise MissingError(reason)
    return lambda x, codes: torch.ops.dlvae_native.nearest_code(x, codes, False, "float32")[0]


_SEARCH = Signature(lambda inputs: (inputs.x, inputs.codes))
_GATHER = Signature(lambda inputs: (inputs.codes, inputs.indices[:, 0]))
ENTRIES = {
    "nearest_code": Entry(
        "nearest_code",
        "tests/functional/test_nearest_code.py",
        ("nearest_code",),
        {"cpu": (sizes.ONE_VECTOR,)},
        (_SEARCH.plain(LIBRARY, dlvae.nearest_code), _SEARCH.chosen("native operation", _native_search)),
        judge.nearest,
    ),
    "gather_codes": Entry(
        "gather_codes",
        "tests/functional/test_gather_codes.py",
        ("gather_codes_fwd",),
        {"cpu": (sizes.CIFAR,)},
        (
            _GATHER.plain(LIBRARY, dlvae.gather_codes),
            _GATHER.plain("F.embedding", lambda codes, indices: embedding(indices, codes)),
        ),
        judge.equals(_GATHER(lambda codes, indices: codes[indices])),
    ),
}


def write(path: Path, size: str | None, seconds: float) -> int:
    """Measure all entries into a CSV file and print the targets. Returns 1 if an answer of this library is wrong.

    Args:
        size: "NxKxD", in place of the size of each entry.
        seconds: time for each entry.
    """
    with results.writing(path, COLUMNS) as add:
        for entry, each in run.select(None, [size] if size else None, _CPU, ENTRIES):
            add(results.completed(_rows(entry, each, seconds), _CPU))
    table = results.read(path)
    for row in table:
        print(f"{row['op']:<13} {row['size']:<16} {row['implementation']:<17} {row['us']:>8} us  {row['status']}")
    print(*targets.check(table, "latency"), sep="\n")
    return int(run.is_library_wrong(table))


def _rows(entry: Entry, size: Size, seconds: float) -> list[results.Row]:
    table = []
    race = measure.race(entry, size, _CPU, seconds=seconds, memory=False)
    times = [[1e6 * each for each in result.seconds.get("forward", ())] for result in race]
    for result, own in zip(race, times, strict=True):
        row: results.Row = {
            "op": entry.name,
            "size": str(size),
            "implementation": result.implementation.name,
            "backend": result.backend,
            "instruction_set": native.instruction_set() if native.instruction_sets() else "",
            "precision": size.precision,
            "status": result.reason,
        }
        if result.verdict is not None:
            row |= {**measure.spread("us", own, ".4g"), **result.verdict.cells()}
        if result is race[0] and all(times):
            row |= measure.spread("over_us", [a - b for a, b in zip(*times, strict=True)], ".4g")
        table.append(row)
    return table

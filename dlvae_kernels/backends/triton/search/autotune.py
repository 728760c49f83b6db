"""Autotuning, opt-in by DLVAE_AUTOTUNE=1: block sizes of the search by measurement, kept in memory and on disk.

Configurations are measured at the first call with a new pair of sizes (vectors and codes, each rounded up to a power of
two), and never while a CUDA graph is captured: warm up first. The file is `dlvae_search.json` in Triton's cache folder;
delete it to measure again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from ..architectures import INTERPRETED, capability
from .config import SearchConfig

_chosen: dict[str, SearchConfig] = {}


def is_wanted() -> bool:
    """Whether autotuning is asked for and possible: on a GPU, and while no CUDA graph is captured."""
    if os.environ.get("DLVAE_AUTOTUNE") != "1" or INTERPRETED:
        return False
    return not torch.cuda.is_current_stream_capturing()


def tuned(
    default: SearchConfig,
    num_vectors: int,
    num_codes: int,
    kind: str,
    run: Callable[[SearchConfig], None],
    seconds: Callable[[Callable[[], None]], float] = lambda call: float(triton.testing.do_bench(call)),
) -> SearchConfig:
    """The fastest configuration for these sizes, each rounded up to a power of two.

    Args:
        kind: dtypes, precision and D, on which the choice depends too.
        run: launches the search with a configuration.
        seconds: measures a call.
    """
    sizes = (triton.next_power_of_2(num_vectors), triton.next_power_of_2(num_codes))
    key = f"{kind} N={sizes[0]} K={sizes[1]} sm_{capability()} triton {triton.__version__}"
    if not _chosen:
        _chosen.update(_read())
    if key not in _chosen:
        _chosen[key] = _fastest(default, run, seconds)
        _write({**_read(), **_chosen})
    return _chosen[key]


def candidates(default: SearchConfig) -> list[SearchConfig]:
    """The default, which comes first, and configurations that differ from it in a few values."""
    compared = default.group * default.compare_d
    found = [default]
    for group in (2, 4, 8):
        for stages in (2, 3, 4):
            for registers in (128, 255):
                found.append(
                    dataclasses.replace(
                        default, group=group, compare_d=compared // group, num_stages=stages, max_registers=registers
                    )
                )
    if default.block_k == 128:
        found.append(dataclasses.replace(default, block_k=256))
        found.append(dataclasses.replace(default, num_warps=4))
        found.append(dataclasses.replace(default, block_n=64, num_warps=4))
    return list(dict.fromkeys(found))


def _fastest(
    default: SearchConfig, run: Callable[[SearchConfig], None], seconds: Callable[[Callable[[], None]], float]
) -> SearchConfig:
    times: dict[SearchConfig, float] = {}
    for config in candidates(default):
        try:
            times[config] = seconds(lambda config=config: run(config))  # type: ignore[misc]
        except OutOfResources:
            # The configuration needs more shared memory or registers than the device has.
            continue
    return min(times, key=lambda config: times[config], default=default)


def _path() -> Path:
    return Path(triton.knobs.cache.dir) / "dlvae_search.json"


def _read() -> dict[str, SearchConfig]:
    """The choices of earlier processes; none if the file is missing or was written by another version."""
    try:
        return {key: SearchConfig(**values) for key, values in json.loads(_path().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(chosen: dict[str, SearchConfig]) -> None:
    _path().parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({key: dataclasses.asdict(config) for key, config in chosen.items()}, indent=1)
    # Other processes may read the file at any time: it is replaced as a whole.
    with tempfile.NamedTemporaryFile("w", dir=_path().parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, _path())

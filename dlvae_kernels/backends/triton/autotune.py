"""Opt-in, by DLVAE_AUTOTUNE=1: block sizes of the search by measurement, kept in memory and on disk.

A size is tuned when it is first seen, rows and codes up to the next power of two, and never while a graph is captured:
warm up first. The file is `dlvae_search.json` in Triton's cache folder; delete it to measure anew.
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

from .tuning import INTERPRETED, SearchConfig, architecture

_chosen: dict[str, SearchConfig] = {}


def is_wanted() -> bool:
    """Whether to measure: asked for, on a GPU, and not within a captured graph."""
    if os.environ.get("DLVAE_AUTOTUNE") != "1" or INTERPRETED:
        return False
    return not torch.cuda.is_current_stream_capturing()


def tuned(
    default: SearchConfig,
    num_rows: int,
    num_codes: int,
    kind: str,
    run: Callable[[SearchConfig], None],
    seconds: Callable[[Callable[[], None]], float] = lambda call: float(triton.testing.do_bench(call)),
) -> SearchConfig:
    """The configuration of the shortest time for rows and codes of about these numbers.

    Args:
        kind: what else the choice depends on.
    """
    sizes = (triton.next_power_of_2(num_rows), triton.next_power_of_2(num_codes))
    key = f"{kind} N={sizes[0]} K={sizes[1]} sm_{architecture()} triton {triton.__version__}"
    if not _chosen:
        _chosen.update(_read())
    if key not in _chosen:
        _chosen[key] = _fastest(default, run, seconds)
        _write({**_read(), **_chosen})
    return _chosen[key]


def candidates(default: SearchConfig) -> list[SearchConfig]:
    """The default, which comes first, and what differs from it in one or two values."""
    look = default.group * default.look_d
    found = [default]
    for group in (2, 4, 8):
        for stages in (2, 3, 4):
            for registers in (128, 255):
                found.append(
                    dataclasses.replace(
                        default, group=group, look_d=look // group, num_stages=stages, max_registers=registers
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
            # More shared memory or registers than there are.
            continue
    return min(times, key=lambda config: times[config], default=default)


def _path() -> Path:
    return Path(triton.knobs.cache.dir) / "dlvae_search.json"


def _read() -> dict[str, SearchConfig]:
    """What earlier processes measured; nothing where the file is missing, or was written by another version."""
    try:
        return {key: SearchConfig(**values) for key, values in json.loads(_path().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(chosen: dict[str, SearchConfig]) -> None:
    _path().parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({key: dataclasses.asdict(config) for key, config in chosen.items()}, indent=1)
    # Whole or not at all, as other processes may read it.
    with tempfile.NamedTemporaryFile("w", dir=_path().parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, _path())

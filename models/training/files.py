"""Atomic writes of the files of a run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = ".partial"


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths for the caller to write, which replace `paths` together if the block ends without an error.

    After an error, or if the process is killed inside the block, the files at `paths` are unchanged.

    Raises:
        OSError: a file cannot be written.
    """
    # The name is random because two processes may write a report on one run at the same time.
    partials = [path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PARTIAL}") for path in paths]
    try:
        yield partials
        for partial in partials:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        for path, partial in zip(paths, partials, strict=True):
            os.replace(partial, path)
    except OSError as error:
        place = paths[0] if len(paths) == 1 else f"a file in {paths[0].parent}"
        raise OSError(f"{place} cannot be written ({error})") from error
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def write_whole(path: Path, data: str | bytes) -> None:
    """Replace a file by one with this content; a string is encoded as UTF-8.

    Raises:
        OSError: it cannot be written; the previous file is unchanged.
    """
    write_together({path: data})


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Replace several files, one directly after the other, after the contents of all are on the disk.

    Raises:
        OSError: one of them cannot be written.
    """
    with replacing(*contents) as partials:
        for partial, data in zip(partials, contents.values(), strict=True):
            partial.write_bytes(data.encode() if isinstance(data, str) else data)


def remove_partial(*paths: Path) -> None:
    """Remove the temporary files of a killed process for these paths, which no other process may be writing."""
    for path in paths:
        for partial in path.parent.glob(f"{path.name}.*{_PARTIAL}"):
            partial.unlink(missing_ok=True)

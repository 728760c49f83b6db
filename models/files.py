"""Files of a run, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = ".partial"


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths for the caller to write, which replace `paths` together when the block ends without an error.

    After an error, or when the process is killed inside the block, the files at `paths` are as they were.

    Raises:
        OSError: a file cannot be written.
    """
    # The name is random because two reports on one run may be written at once.
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
    """Replace a file by one with this content; text is encoded as UTF-8.

    Raises:
        OSError: it cannot be written; the file that was there before is as it was.
    """
    write_together({path: data})


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Replace several files, one directly after the other, once the contents of all are on the disk.

    Raises:
        OSError: one of them cannot be written.
    """
    with replacing(*contents) as partials:
        for partial, data in zip(partials, contents.values(), strict=True):
            partial.write_bytes(data.encode() if isinstance(data, str) else data)


def remove_partial(*paths: Path) -> None:
    """Remove temporary files that a killed process left beside these paths, which no other process may be writing."""
    for path in paths:
        for partial in path.parent.glob(f"{path.name}.*{_PARTIAL}"):
            partial.unlink(missing_ok=True)

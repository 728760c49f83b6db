"""The metrics of a run: metrics.csv and TensorBoard events."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import write_whole

COLUMNS = ("update", "nmse", "loss", "perplexity", "usage_perplexity", "utilisation", "revived", "lr")
# The columns of the usage of the codebook: NaN for a dictionary, and in the rows of an earlier version without them.
_USAGE = ("usage_perplexity", "utilisation", "revived")
_EARLIER_COLUMNS = tuple(name for name in COLUMNS if name not in _USAGE)
_ADVICE = "restore it from a copy, or delete it and resume the run without the metrics of earlier updates"


class Metrics:
    """Rows of COLUMNS in metrics.csv, in the order of the updates."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.csv"
        self._folder = folder
        self._board: Any = None

    def begin(self) -> None:
        self._write([])

    def cut(self, update: int) -> None:
        """Remove the rows of the updates after `update`, which are repeated; the last row may be incomplete.

        Raises:
            ValueError: the rows up to `update` cannot be read.
        """
        self._write(self.rows(update) if self._path.exists() else [])

    def rows(self, update: int) -> list[list[str]]:
        """The rows up to an update; they were complete before the checkpoint of that update was saved.

        Raises:
            ValueError: the file is missing or broken.
        """
        # To open a pipe would block.
        if not self._path.is_file():
            raise ValueError(f"{self._path} is missing or not a regular file; {_ADVICE}")
        header, *lines = self._path.read_bytes().split(b"\n")
        columns = _EARLIER_COLUMNS if header == ",".join(_EARLIER_COLUMNS).encode() else COLUMNS
        if update > 0 and header != ",".join(columns).encode():
            raise ValueError(f"line 1 of {self._path} is not {','.join(COLUMNS)}; {_ADVICE}")
        rows: list[list[str]] = []
        last = 0
        for number, line in enumerate(lines, start=2):
            # The following rows may be incomplete: the process may have been killed while it wrote them.
            if last == update or (not line and number == len(lines) + 1):
                break
            row = _parsed(line, last, columns)
            if row is None:
                raise ValueError(f"line {number} of {self._path} is not a row of a later update; {_ADVICE}")
            if int(row[0]) > update:
                break
            rows.append(row)
            last = int(row[0])
        return rows

    def open_board(self, update: int) -> None:
        """Write TensorBoard events as well, from an update on, if TensorBoard is installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: no events are written", file=sys.stderr)
        else:
            self._board = SummaryWriter(str(self._folder), purge_step=update)

    def add(self, rows: Iterable[tuple[float, ...]]) -> None:
        """Append rows; the first value of a row is its update, counted from 1."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            for update, *values in rows:
                writer.writerow([update, *(f"{value:.6g}" for value in values)])
                for name, value in zip(COLUMNS[1:], values, strict=True) if self._board else ():
                    if not math.isnan(value):
                        self._board.add_scalar(name, value, update)

    def close(self) -> None:
        """Close the TensorBoard events, if they are open."""
        if self._board:
            self._board.close()

    def _write(self, rows: list[list[str]]) -> None:
        write_whole(self._path, "".join(",".join(row) + "\n" for row in [COLUMNS, *rows]))


def _parsed(line: bytes, last: int, columns: tuple[str, ...]) -> list[str] | None:
    """The fields of a line, one for each of COLUMNS, or None if it is not a complete row of an update after `last`."""
    try:
        row = dict(zip(columns, line.decode().split(","), strict=True))
        is_later = row["update"].isdecimal() and last < int(row["update"])
        is_valid = all(math.isfinite(float(value)) or name in _USAGE for name, value in row.items())
    except ValueError:
        return None
    return [row.get(name, "nan") for name in COLUMNS] if is_later and is_valid else None

"""The metrics of a run: metrics.csv and TensorBoard events."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

COLUMNS = ("update", "nmse", "loss", "perplexity", "lr")


class Metrics:
    """Rows of COLUMNS in the folder of a run, in the order of the updates."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.csv"
        self._folder = folder
        self._board: Any = None

    def begin(self) -> None:
        self._write([])

    def cut(self, update: int) -> None:
        """Take away the rows of later updates, of which the last may be incomplete: they are done again."""
        rows: list[list[str]] = []
        if self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as file:
                whole = [row for row in csv.reader(file) if len(row) == len(COLUMNS)]
                rows = [row for row in whole if row[0].isdigit() and int(row[0]) <= update]
        self._write(rows)

    def open_board(self, update: int) -> Metrics:
        """Write TensorBoard events too, from an update on, where TensorBoard is installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: no events are written", file=sys.stderr)
        else:
            self._board = SummaryWriter(str(self._folder), purge_step=update)
        return self

    def add(self, rows: Iterable[tuple[float, ...]]) -> None:
        """Append rows, of which each begins with its update, counted from 1."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            for update, *values in rows:
                writer.writerow([update, *(f"{value:.6g}" for value in values)])
                for name, value in zip(COLUMNS[1:], values, strict=True) if self._board else ():
                    self._board.add_scalar(name, value, update)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board:
            self._board.close()

    def _write(self, rows: list[list[str]]) -> None:
        write_whole(self._path, "".join(",".join(row) + "\n" for row in [COLUMNS, *rows]))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

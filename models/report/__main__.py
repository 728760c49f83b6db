"""Write the report of a run: `python -m models.report RUN`."""

from __future__ import annotations

import sys
from pathlib import Path

from ..training.config import Parser
from ..training.data import SetupError
from ..training.device import pick_device
from . import report


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m models.report", description="Write the report of a run.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    options = parser.parse_args(arguments)
    try:
        report.write(options.run, pick_device(options.device))
    except (SetupError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

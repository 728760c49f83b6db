from __future__ import annotations

import re

import torch

from benchmarks import readme, results
from benchmarks.registry import ENTRIES


def test_the_table_is_not_stale():
    text = (results.ROOT / "README.md").read_text()
    assert readme.updated(text) == text, "run `make readme-table`"


def test_the_example_runs():
    text = (results.ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.strip().splitlines()) <= 8
    names: dict = {}
    exec(example, names)
    assert names["indices"].shape == (8, 16, 16)


def test_no_loss_is_left_out():
    """The table takes whole groups of rows: every contender that was timed beside ours stands in it."""
    for file in results.FOLDER.glob("[cg]pu.csv"):
        rows = [row for row in results.read(file) if row["ms"] and row["op"] in ENTRIES]
        # What came after the file was measured has no rows yet.
        for op in dict.fromkeys(row["op"] for row in rows):
            first = next(row for row in rows if row["op"] == op)
            group = [row for row in rows if all(row[key] == first[key] for key in ("op", "workload", "size"))]
            (line,) = (
                each
                for each in readme.table().splitlines()
                if f"| {op} | {first['size']} ({first['workload']})" in each
            )
            for row in group[1:]:
                assert row["pass"] == "backward" or f"{row['contender']} " in line
                assert row["ratio"] == "1.000" or readme._two_digits(float(row["ratio"])) in line


def test_summaries_of_runs_are_collected(tmp_path):
    (tmp_path / "summary.json").write_text('{"model": "dlvae", "nmse": 0.5}')
    path = tmp_path / "training.csv"
    results.write_training([tmp_path], path, torch.device("cpu"))
    (row,) = results.read(path)
    assert (row["model"], row["nmse"], row["torch"]) == ("dlvae", "0.5", torch.__version__)

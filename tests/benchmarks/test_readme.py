"""The numbers of the README come from committed rows."""

from __future__ import annotations

import re

import pytest

from benchmarks import readme, results
from benchmarks.registry import ENTRIES


@pytest.mark.parametrize("page", readme.PAGES)
def test_tables_of_a_page_equal_those_of_the_committed_rows(page):
    text = (results.ROOT / page).read_text()
    assert readme.updated(page, text) == text, "run `make readme-table`"


def test_updated_without_markers_raises():
    with pytest.raises(ValueError, match=re.escape("README.md holds no <!-- results")):
        readme.updated("README.md", "a page without a table")


def test_table_lists_every_baseline_of_a_shown_workload():
    for file in results.FOLDER.glob("[cg]pu.csv"):
        rows = [row for row in results.read(file) if row["ms"] and row["op"] in ENTRIES]
        # An operation that is newer than the file has no rows yet.
        for op in dict.fromkeys(row["op"] for row in rows):
            first = next(row for row in rows if row["op"] == op)
            group = [row for row in rows if all(row[key] == first[key] for key in ("op", "workload", "size"))]
            begin = f"| {op} | {first['size']} ({first['workload']})"
            (line,) = (each for each in readme.tables().splitlines() if each.startswith(begin))
            for row in group[1:]:
                assert row["pass"] == "backward" or f"{row['implementation']} " in line
                assert row["ratio"] == "1.000" or readme.two_digits(float(row["ratio"])) in line


def test_summary_lists_every_baseline_of_its_rows():
    rows = [row for row in results.read(results.FOLDER / "cpu.csv") if row["ms"]]
    lines = readme.summary().splitlines()
    for op, workload in readme.SUMMARY:
        (line,) = (each for each in lines if each.startswith(f"| {op} |") and f"({workload})" in each)
        baselines = {row["implementation"] for row in rows if (row["op"], row["workload"]) == (op, workload)}
        assert len(baselines) > 1
        assert all(f"{name} " in line for name in baselines - {"dlvae_kernels"})

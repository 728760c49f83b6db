from __future__ import annotations

import re

import torch

from benchmarks import measure, readme, registry
from benchmarks.__main__ import operations, training


def test_the_table_is_not_stale():
    text = (readme.ROOT / "README.md").read_text()
    assert readme.updated(text) == text, "run `make readme-table`"


def test_the_example_runs():
    text = (readme.ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.strip().splitlines()) <= 8
    names: dict = {}
    exec(example, names)
    assert names["indices"].shape == (8, 16, 16)


def test_ratios_are_over_ours():
    case = registry.Case("op", (1,), lambda device: {"ours": lambda: None, "other": lambda: torch.ones(300_000).exp()})
    ours, other = measure.rows(case, torch.device("cpu"))
    assert ours["ratio"] == "1.00"
    assert float(other["ratio"]) > 2
    assert set(measure.COLUMNS) == set(ours)


def test_rows_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "ops.csv"
    operations((registry._ema_update(50, 7, 3), registry._sparse_decode(50, 7, 3, 2)), torch.device("cpu"), path)
    assert [row["contender"] for row in measure.read(path)] == ["dlvae_kernels", "plain PyTorch"] * 2
    (tmp_path / "summary.json").write_text('{"model": "dlvae", "nmse": 0.5}')
    training([tmp_path], path, torch.device("cpu"))
    (row,) = measure.read(path)
    assert (row["model"], row["nmse"], row["torch"]) == ("dlvae", "0.5", torch.__version__)


def test_contenders_agree():
    """A fast wrong answer would be no contender."""
    device = torch.device("cpu")
    nearest, plain = (run() for run in registry._nearest_code(200, 30, 8).contenders(device).values())
    assert torch.equal(nearest, plain)
    (indices, _), plain_topk = (run() for run in registry._topk_codes(200, 30, 8, 5).contenders(device).values())
    assert torch.equal(indices, plain_topk.indices)

"""Targets are measured by the registry and checked against rows."""

from __future__ import annotations

import pytest

from benchmarks import latency, results, targets
from benchmarks.registry import ENTRIES
from benchmarks.sizes import CIFAR, LARGEST, WIDE, half
from benchmarks.targets import Most, Speed


def row(op, size, implementation, name="forward", precision="float32", **values):
    common = {"op": op, "size": str(size), "implementation": implementation, "status": "ok"}
    return {**common, "pass": name, "precision": precision, **values}


@pytest.mark.parametrize(
    ("kind", "target"), [(kind, each) for kind, found in targets.TARGETS.items() for each in found], ids=str
)
def test_targets_are_measured_by_the_registry(kind, target):
    entry = (latency.ENTRIES if kind == "latency" else ENTRIES)[target.op]
    assert target.size in entry.sizes["cpu" if kind == "latency" else kind]
    if isinstance(target, Speed):
        assert {target.baseline, target.own} <= {each.name for each in entry.implementations}
    else:
        assert target.column in (latency.COLUMNS if kind == "latency" else results.COLUMNS)


def test_speed_adds_all_passes_in_one_precision():
    target = Speed("nearest_code", WIDE, "flash-kmeans", 2)
    rows = [
        row("nearest_code", WIDE, "dlvae_kernels", ms="3"),
        row("nearest_code", WIDE, "dlvae_kernels", "backward", ms="1"),
        row("nearest_code", WIDE, "flash-kmeans", precision="tf32", ms="8"),
        row("nearest_code", WIDE, "flash-kmeans", precision="bfloat16", ms="1"),
    ]
    assert target.outcome(rows) == (True, "2.00x: 4 ms and 8 ms")
    rows[0]["ms"] = "3.1"
    assert target.outcome(rows)[0] is False
    assert Speed("nearest_code", half(WIDE), "flash-kmeans", 2).outcome(rows) is None
    rows[2]["status"] = "wrong"
    assert target.outcome(rows) is None


def test_speed_of_one_pass_ignores_the_other():
    rows = [
        row("sparse_decode", WIDE, name, which, ms=ms)
        for name, which, ms in (
            ("dlvae_kernels", "forward", "3"),
            ("dlvae_kernels", "backward", "1"),
            ("sparsify", "forward", "3"),
            ("sparsify", "backward", "2"),
        )
    ]
    by_pass = {only: Speed("sparse_decode", WIDE, "sparsify", 1.5, only) for only in ("forward", "backward", None)}
    reached = {only: target.outcome(rows)[0] for only, target in by_pass.items()}
    assert reached == {"forward": False, "backward": True, None: False}
    assert str(by_pass["backward"]).startswith("sparse_decode backward at")


def test_most_is_checked_against_the_column():
    target = Most("nearest_code", LARGEST, "peak_mb", 200, "MB")
    assert target.outcome([]) is None
    found = row("nearest_code", LARGEST, "dlvae_kernels", peak_mb="31.5")
    assert target.outcome([found]) == (True, "31.5")
    assert target.outcome([{**found, "peak_mb": "200.1"}])[0] is False
    assert target.outcome([{**found, "status": "wrong"}]) is None


def test_check_has_a_line_for_each_target():
    slow = [row("VectorQuantizerEMA", CIFAR, name, ms="1") for name in ("dlvae_kernels", "vector-quantize-pytorch")]
    lines = targets.check(slow, "cuda")
    assert len(lines) == len(targets.TARGETS["cuda"])
    (missed,) = [line for line in lines if line.startswith("MISSED")]
    assert "VectorQuantizerEMA at 16384 x 512 x 64 float32: 10x as fast as vector-quantize-pytorch (1.00x" in missed
    assert sum(line.startswith("not measured") for line in lines) == len(lines) - 1

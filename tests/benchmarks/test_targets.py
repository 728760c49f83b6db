from __future__ import annotations

import pytest

from benchmarks import targets
from benchmarks.registry import ENTRIES
from benchmarks.sizes import CIFAR, LARGEST, WIDE, half


def row(op, size, contender, **values):
    return {"op": op, "size": str(size), "contender": contender, "pass": "forward", "status": "ok", **values}


@pytest.mark.parametrize(
    ("kind", "target"), [(kind, each) for kind, found in targets.TARGETS.items() for each in found], ids=str
)
def test_a_run_measures_it(kind, target):
    entry = ENTRIES[target.op]
    assert target.size in entry.sizes[kind]
    if isinstance(target, targets.Speed):
        assert target.contender in [each.name for each in entry.contenders]


def test_speed_is_of_all_passes_in_one_precision():
    target = targets.Speed("nearest_code", WIDE, "flash-kmeans", 2)
    rows = [
        row("nearest_code", WIDE, "dlvae_kernels", ms="3", precision="float32"),
        row("nearest_code", WIDE, "dlvae_kernels", ms="1", precision="float32", **{"pass": "backward"}),
        row("nearest_code", WIDE, "flash-kmeans", ms="8", precision="tf32"),
        row("nearest_code", WIDE, "flash-kmeans", ms="1", precision="bfloat16"),
    ]
    assert target.reached(rows) == (True, "2.00x: 4 ms against 8 ms")
    rows[0]["ms"] = "3.1"
    assert target.reached(rows)[0] is False
    assert targets.Speed("nearest_code", half(WIDE), "flash-kmeans", 2).reached(rows) is None
    rows[2]["status"] = "wrong"
    assert target.reached(rows) is None


def test_speed_can_be_of_one_pass():
    rows = [
        row("sparse_decode", WIDE, name, ms=ms, precision="float32", **{"pass": which})
        for name, which, ms in (
            ("dlvae_kernels", "forward", "3"),
            ("dlvae_kernels", "backward", "1"),
            ("sparsify", "forward", "3"),
            ("sparsify", "backward", "2"),
        )
    ]
    of = {only: targets.Speed("sparse_decode", WIDE, "sparsify", 1.5, only) for only in ("forward", "backward", None)}
    assert {only: target.reached(rows)[0] for only, target in of.items()} == {
        "forward": False,
        "backward": True,
        None: False,
    }
    assert str(of["backward"]).startswith("sparse_decode backward at")


def test_memory():
    target = targets.Memory("nearest_code", LARGEST, 200)
    assert target.reached([]) is None
    found = row("nearest_code", LARGEST, "dlvae_kernels", peak_mb="31.5", precision="float32")
    assert target.reached([found]) == (True, "31.5 MB")
    assert target.reached([{**found, "peak_mb": "200.1"}])[0] is False


def test_each_target_has_a_line():
    slow = [
        row("VectorQuantizerEMA", CIFAR, name, ms="1", precision="float32")
        for name in ("dlvae_kernels", "vector-quantize-pytorch")
    ]
    lines = targets.check(slow, "cuda")
    assert len(lines) == len(targets.TARGETS["cuda"])
    (missed,) = [line for line in lines if line.startswith("MISSED")]
    assert "VectorQuantizerEMA at 16384 x 512 x 64 float32: 10x as fast as vector-quantize-pytorch (1.00x" in missed
    assert sum(line.startswith("not measured") for line in lines) == len(lines) - 1

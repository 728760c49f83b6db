"""The Triton kernels without a GPU: their values by Triton's interpreter, their code by its compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlvae_kernels.backends import triton, why_not

ROOT = Path(__file__).parents[2]
# What takes the interpreter minutes: thousands of rows summed one by one, and rescans of all of them.
LONG = ("repeats", "cancel", "several_chunks", "size3", "ignores_the_callers")


@pytest.mark.slow
def test_every_operation_in_the_interpreter():
    chosen = f"triton-cpu and not ({' or '.join(LONG)})"
    words = ["-m", "pytest", "tests/functional", "-q", "-k", chosen, "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 90


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_the_search_compiles_onto_matrix_units_without_spills(arch):
    code = f"""
from benchmarks import offline
chosen = ("D=64 float32 float32", "D=64 bfloat16 float32")
offline.cases = lambda all=offline.cases(): {{name: all[name] for name in chosen}}
for kernel in offline.compile_all(({arch},)):
    print(kernel.label, kernel.faults(), *kernel.matrix, kernel.per_distance, sep="|")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line.split("|") for line in result.stdout.splitlines()]
    searches = [row for row in rows if row[0].startswith("_search_kernel")]
    assert len(searches) == 2
    assert all(row[1] == "[]" for row in rows)
    for row in searches:
        assert row[2] == {90: "HGMMA", 100: "UTCHMMA"}[arch]
        assert float(row[3]) < 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_why_it_cannot_run_here():
    x = torch.zeros(2, 3)
    assert "no CUDA device" in why_not("triton", "nearest_code", x)
    assert "not written yet" in why_not("triton", "topk_codes", x)


def test_types_and_devices_that_it_does_not_take(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not("triton", "nearest_code", torch.zeros(2, 3)) is None
    assert "float64" in why_not("triton", "nearest_code", torch.zeros(2, 3).double())
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "on cpu" in why_not("triton", "nearest_code", torch.zeros(2, 3))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "compute capability 9.0" in why_not("triton", "nearest_code")


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'cublas'"):
        _ = triton.cublas


def test_parts_are_kept_until_the_codebook_changes():
    code = """
import torch
from dlvae_kernels.backends.triton.codebook_parts import codebook_parts
from dlvae_kernels.backends.triton.tuning import SearchConfig
config = SearchConfig(128, 128, 16, 8, 2)
codebook = torch.randn(5, 3)
first = codebook_parts(codebook, config, torch.float16, True)
assert codebook_parts(codebook.detach(), config, torch.float16, True) is first
assert codebook_parts(codebook[:4], config, torch.float16, True) is not first
codebook.mul_(2)
second = codebook_parts(codebook, config, torch.float16, True)
assert second is not first
rows, shift = second.high[:5, :3].float() + second.low[:5, :3].float(), second.high.float().abs().max()
assert 2**13 <= shift <= 2**15
torch.testing.assert_close(rows / rows.norm(), codebook / codebook.norm(), rtol=2e-6, atol=1e-7)
with torch.inference_mode():
    inferred = torch.randn(5, 3)
    assert codebook_parts(inferred, config, torch.float16, True) is not codebook_parts(
        inferred, config, torch.float16, True
    )
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]

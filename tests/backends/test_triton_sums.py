"""The Triton kernels that sum rows and atoms: chains of float32 additions are short. By Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One program sums all rows, as each does where rows are many.
_SETUP = """
from importlib import import_module
import torch
names = "architectures", "sums.one_hot_sum", "decode.dense_decode", "sparse_decode", "sums.segment_sum", "language.rows"
architectures, one_hot_sum, dense_decode, sparse_decode, segment_sum, rows = (
    import_module(f"dlvae_kernels.backends.triton.{name}") for name in names
)
architectures.wanted_programs = lambda: 1
def check(actual, exact):
    error = float((actual.double() / exact - 1).abs().max())
    assert error <= 2e-6, error
value = torch.tensor(1.7)
"""
CASES = {
    "one_hot_sum": """
x = value.expand(2**16, 1)
sums = one_hot_sum.one_hot_sum(rows.as_rows(x.clone()), torch.zeros(len(x), dtype=torch.int64), 1)
check(sums[0, 0], value.double() * len(x))
assert sums[0, 1] == len(x)
""",
    "dense_decode_bwd_dictionary": """
x, indices = value.expand(2**15, 1).clone(), torch.zeros(2**15, 1, dtype=torch.int64)
sums = dense_decode.dense_decode_bwd_dictionary(rows.as_rows(x), torch.ones(2**15, 1), indices, 1)
check(sums, value.double() * len(x))
""",
    "join_edges": """
chunks, size = 2**14, segment_sum.CHUNK
codes, edges = torch.zeros(chunks * size, dtype=torch.int16), (value * size).expand(chunks, 2, 2).clone()
out = torch.zeros(1, 2)
segment_sum._join_edges_kernel[1, 1](codes, out, edges, len(codes), 1, chunks, CHUNK=size, AHEAD=16, BLOCK_D=16)
check(out, value.double() * len(codes))
""",
    "sparse_decode_fwd": """
sparse_decode.suits = lambda *sizes: False
values, indices = value.expand(1, 4096), torch.zeros(1, 4096, dtype=torch.int64)
check(sparse_decode.sparse_decode_fwd(values, indices, torch.ones(1, 1)), value.double() * 4096)
""",
}


@pytest.mark.parametrize("case", CASES)
def test_triton_sum_equal_terms_error_is_bounded(case):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, "-c", _SETUP + CASES[case]]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_one_hot_sum_does_not_take_more_rows_than_float32_counts():
    code = """
import torch
from dlvae_kernels.backends.triton.language import rows
from dlvae_kernels.backends.triton.sums import one_hot_sum
x = torch.ones(1, 1)
assert one_hot_sum.suits(rows.as_rows(x.expand(2**24, 1)), 1)
assert not one_hot_sum.suits(rows.as_rows(x.expand(2**24 + 1, 1)), 1)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]

"""Heads and masks in Triton's interpreter: each head has the bits of a codebook by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Neither K is a multiple of a tile of codes, nor N of a block of vectors.
_SETUP = """
import torch
from dlvae_kernels.backends.triton import architectures, ema_update, operations as kernels
from dlvae_kernels.backends.triton.language import rows
heads, num_codes, d = 3, 140, 4
x = torch.randn(6, heads, d)
# The scales of the terms differ from head to head.
codebook = torch.randn(heads, num_codes, d) * torch.tensor([1e-6, 1, 1e6])[:, None, None]
codebook[:, 130] = codebook[:, 3]
x[0] = codebook[:, 3]
def check_search(x, codebook, precision):
    indices, distances = kernels.nearest_code(x, codebook, True, precision)
    for head in range(heads):
        expected = kernels.nearest_code(x[..., head, :], codebook[head], True, precision)
        assert torch.equal(indices[..., head], expected[0]) and torch.equal(distances[..., head], expected[1])
    return indices
"""
CASES = {
    "nearest_code_partitions": """
assert architectures.partition(heads, 2, max_partitions=64)[0] == 2
assert check_search(x, codebook, "float32")[0].tolist() == [3, 3, 3]
assert check_search(x, codebook, "exact")[0].tolist() == [3, 3, 3]
""",
    "nearest_code_one_partition": """
architectures.wanted_programs = lambda: 1
assert check_search(x, codebook, "float32")[0].tolist() == [3, 3, 3]
check_search(x.half(), codebook.half(), "float32")
""",
    "nearest_code_any_strides": """
# Three strides reach the vectors of a map, and more those of the second.
map = torch.randn(2, heads, d, 3).permute(0, 3, 1, 2)
assert rows.as_rows(map, heads).tensor is map
check_search(map, codebook.transpose(0, 1).contiguous().transpose(0, 1), "float32")
check_search(torch.randn(2, heads, 2, d, 3).permute(4, 0, 2, 1, 3)[:2], codebook, "float32")
""",
    "vector_quantize": """
for wanted in (1, 264):
    architectures.wanted_programs = lambda: wanted
    outputs = kernels.vector_quantize_fwd(x, codebook, True, "float32", None)
    quantized, indices, loss, _, counts, half_error = outputs
    expected = [kernels.vector_quantize_fwd(x[:, h], codebook[h], True, "float32", None) for h in range(heads)]
    for place in (0, 1, 5):
        assert torch.equal(outputs[place], torch.stack([each[place] for each in expected], 1))
    assert torch.equal(counts, torch.stack([each[4] for each in expected]))
    torch.testing.assert_close(loss, sum(each[2] for each in expected) / heads)
""",
    "vector_quantize_mask": """
for x, codebook in ((x, codebook), (x[:, 1], codebook[1])):
    all_valid = kernels.vector_quantize_fwd(x, codebook, True, "float32", None)
    mask = torch.rand(x.shape[:-1]) < 0.5
    mask.view(-1)[0] = False
    x.view(-1, d)[0] = torch.nan
    quantized, indices, loss, _, counts, half_error = kernels.vector_quantize_fwd(x, codebook, True, "float32", mask)
    assert torch.equal(indices, torch.where(mask, all_valid[1], -1))
    assert torch.equal(quantized, torch.where(mask[..., None], all_valid[0], 0))
    assert torch.equal(half_error, torch.where(mask[..., None], all_valid[5], 0))
    torch.testing.assert_close(loss, 4 * half_error.square().sum() / (mask.sum() * d))
    assert int(counts.sum()) == int(mask.sum())
    none = kernels.vector_quantize_fwd(x, codebook, True, "float32", torch.zeros_like(mask))
    assert none[2] == 0 and not none[0].any() and not none[4].any() and (none[1] == -1).all()
    one = torch.ones(())
    grads = kernels.vector_quantize_bwd(
        x, one, one, half_error, indices, num_codes, 1 + (x.ndim == 3) * 2, True, True
    )
    assert not grads[0][~mask].any() and not any(grad.isnan().any() for grad in grads)
""",
    "sums": """
indices = torch.randint(-1, num_codes, (6, heads))
x[1, 1] = torch.inf
for suits in (True, False):
    ema_update.suits = lambda *sizes: suits
    sums = kernels.ema_statistics(x, indices, num_codes, heads).view(heads, num_codes, d + 1)
    for head in range(heads):
        torch.testing.assert_close(sums[head], kernels.ema_statistics(x[:, head], indices[:, head], num_codes, 1))
    assert sums[..., -1].sum() == (indices >= 0).sum() - int(indices[1, 1] >= 0)
x[1, 1] = 0
grads = kernels.gather_codes_bwd(x, indices, num_codes, heads).view(heads, num_codes, d)
for head in range(heads):
    torch.testing.assert_close(grads[head], kernels.gather_codes_bwd(x[:, head], indices[:, head], num_codes, 1))
codes = kernels.gather_codes_fwd(codebook, indices)
assert torch.equal(codes, torch.stack([kernels.gather_codes_fwd(codebook[h], indices[:, h]) for h in range(heads)], 1))
""",
    "ema_step": """
state = codebook, torch.rand(heads, num_codes), torch.randn(heads, num_codes, d)
statistics = torch.rand(heads, num_codes, d + 1)
expected = [[each[head].clone() for each in state] for head in range(heads)]
kernels.ema_step(*state, statistics, 0.9, 1e-5)
for head in range(heads):
    kernels.ema_step(*expected[head], statistics[head], 0.9, 1e-5)
    assert all(torch.equal(each[head], like) for each, like in zip(state, expected[head], strict=True))
""",
}


@pytest.mark.parametrize("case", CASES)
def test_triton_heads_equal_codebooks_one_by_one(case):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, "-W", "ignore", "-c", _SETUP + CASES[case]]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]

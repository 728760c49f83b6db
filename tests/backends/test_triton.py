"""The Triton kernels without a GPU: their values by Triton's interpreter, their code by its compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from dlvae_kernels.backends import unavailable_reason
from dlvae_kernels.backends.triton import operations
from tools import offline

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_triton_operations_interpreted_match_float64():
    words = ["-m", "pytest", "tests/functional", "-q", "-W", "ignore::RuntimeWarning", "-m"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, *words, "interpreter and not large"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.slow
def test_triton_kernels_every_architecture_compile_without_spills():
    words = [sys.executable, "-m", "tools.offline"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = result.stdout.splitlines()
    assert sum("_search_kernel" in line for line in found) > 90
    for arch, matrix in ((80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")):
        assert any(line.startswith(f"sm_{arch} ") and f" {matrix} x" in line for line in found)
    # The most instructions outside the matrix units for each distance, by inputs.
    for inputs, most in (("float32", 5.0), ("float16", 4.0), ("bfloat16", 4.0)):
        case = f"_search_kernel D=64 K=16384 {inputs} float32"
        (line,) = [each for each in found if case in each and each.startswith("sm_90")]
        assert float(re.search(r"([0-9.]+) other instructions", line)[1]) <= most


def test_offline_kernel_with_faults_reports_them():
    kernel = offline.Kernel("_search_kernel D=64", "", 90, 255, 8, 2**20, {}, 0, None)
    assert [fault.split()[0] for fault in kernel.faults()] == ["spills", "uses", "has"]
    fine = offline.Kernel("_search_kernel D=64", "", 90, 255, 0, 2**10, {"HGMMA": 4}, 2, 3.5)
    assert fine.faults() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_unavailable_reason_without_cuda_names_it():
    assert "no CUDA device" in unavailable_reason("triton", "nearest_code", torch.zeros(2, 3))
    assert "no Triton kernel for faiss" in unavailable_reason("triton", "faiss")


def test_unavailable_reason_dtypes_and_devices_are_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert unavailable_reason("triton", "nearest_code", torch.zeros(2, 3)) is None
    assert "float64" in unavailable_reason("triton", "nearest_code", torch.zeros(2, 3).double())
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "on cpu" in unavailable_reason("triton", "nearest_code", torch.zeros(2, 3))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
    assert "compute capability (8, 0) or newer, and cuda:0 has (7, 5)" in unavailable_reason(
        "triton", "nearest_code", x
    )


@pytest.mark.parametrize(
    ("size", "is_dense"),
    [
        ((16_384, 512, 256, 100, torch.float32), True),
        ((16_384, 512, 256, 100, torch.bfloat16), True),
        ((16_384, 32_768, 768, 32, torch.float32), False),
        ((2_048, 2_048, 256, 2, torch.float32), False),
        ((1, 512, 256, 100, torch.float32), False),
    ],
)
def test_sparse_decode_few_atoms_takes_dense_kernels(size, is_dense, monkeypatch):
    num_rows, num_atoms, num_features, kept, dtype = size
    module = import_module("dlvae_kernels.backends.triton.sparse_decode")
    taken = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: taken.append("_sparse_decode_fwd_kernel")

    monkeypatch.setattr(module, "_sparse_decode_fwd_kernel", Kernel())
    names = "dense_decode_fwd", "dense_decode_bwd_values", "dense_decode_bwd_dictionary", "_bwd_values", "segment_sum"
    for name in names:
        monkeypatch.setattr(module, name, lambda *args, name=name: taken.append(name) or torch.empty(1, 1))
    monkeypatch.setattr(module, "flat_codes", lambda indices, num_codes: indices)
    monkeypatch.setattr(import_module("dlvae_kernels.backends.triton.architectures"), "capability", lambda: 90)
    with FakeTensorMode():
        values, indices = torch.empty(num_rows, kept, dtype=dtype), torch.empty(num_rows, kept, dtype=torch.int64)
        dictionary = torch.empty(num_atoms, num_features, dtype=dtype)
        out = operations.sparse_decode_fwd(values, indices, dictionary)
        operations.sparse_decode_bwd(out, values, indices, dictionary, True, True)
    assert taken == (list(names[:3]) if is_dense else ["_sparse_decode_fwd_kernel", "_bwd_values", "segment_sum"])


@pytest.mark.parametrize(("capability", "row"), [(80, 80), (86, 80), (90, 90), (100, 100), (120, 100)])
def test_architecture_without_a_row_takes_the_newest_older_one(capability, row, monkeypatch):
    architectures = import_module("dlvae_kernels.backends.triton.architectures")
    monkeypatch.setattr(architectures, "capability", lambda: capability)
    assert architectures.architecture() is architectures.TABLE[row]


def test_wanted_programs_multiprocessors_come_from_the_driver(monkeypatch):
    architectures = import_module("dlvae_kernels.backends.triton.architectures")
    monkeypatch.setattr(architectures, "capability", lambda: 90)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert architectures.wanted_programs() == 2 * 132
    monkeypatch.setattr(architectures, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=16))
    architectures._multiprocessors.cache_clear()
    try:
        assert architectures.wanted_programs() == 2 * 16
        assert architectures.partition(4, 100) == (8, 13)
        assert architectures.partition(4, 100, max_tiles=10) == (10, 10)
        assert architectures.partition(4, 100, max_partitions=2) == (2, 50)
        assert architectures.partition(1000, 100) == (1, 100)
    finally:
        architectures._multiprocessors.cache_clear()


def test_operations_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'cublas'"):
        _ = operations.cublas


def test_codebook_terms_sum_equals_scaled_codebook():
    code = """
import torch
from dlvae_kernels.backends.triton.language.rows import as_codes
from dlvae_kernels.backends.triton.search.codebook_terms import codebook_terms
codebook = torch.randn(5, 3)
options = {"block_k": 128, "dtype": torch.float16, "two_terms": True}
terms = codebook_terms(as_codes(codebook), padded=16, **options)
rows, shift = terms.high[:5, :3].float() + terms.low[:5, :3].float(), terms.high.float().abs().max()
assert 2**13 <= shift <= 2**15
torch.testing.assert_close(rows / rows.norm(), codebook / codebook.norm(), rtol=2e-6, atol=1e-7)
packed = codebook_terms(as_codes(codebook), padded=32, packed=True, **options).high[:5].float()
high, same, low, bias = packed.split([3, 3, 3, 23], dim=1)
assert torch.equal(high, terms.high[:5, :3].float()) and torch.equal(high, same)
assert torch.equal(low, terms.low[:5, :3].float())
assert not bias[:, 3:].any()
bias = bias[:, :3].double() @ torch.tensor([1.0, 2.0**-9, 2.0**-18]).double()
expected = codebook.double().square().sum(1)
torch.testing.assert_close(bias / bias.sum(), expected / expected.sum(), rtol=1e-6, atol=0)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_codebook_terms_of_several_codebooks_are_those_of_each():
    code = """
import torch
from dlvae_kernels.backends.triton.language.rows import as_codes
from dlvae_kernels.backends.triton.search.codebook_terms import codebook_terms
codebooks = torch.randn(3, 40, 5) * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
codebooks[1, 0, 0], codebooks[2, 7, 2] = torch.nan, torch.inf
for packed, padded in ((False, 16), (True, 32)):
    options = {"padded": padded, "block_k": 16, "dtype": torch.float16, "two_terms": True, "packed": packed}
    counts = torch.ones(3, 40, dtype=torch.int64)
    terms = codebook_terms(as_codes(codebooks), counts=counts, **options)
    assert not counts.any() and not terms.extremes[:, 3].any()
    for b, codebook in enumerate(codebooks):
        alone = codebook_terms(as_codes(codebook), **options)
        for found, expected in zip(terms, alone, strict=True):
            part = found.view(3, -1, *found.shape[1:])[b].view(expected.shape)
            torch.testing.assert_close(part, expected, rtol=0, atol=0, equal_nan=True)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_residual_search_exact_searches_uncertain_vectors_again():
    code = """
import torch
from dlvae_kernels import residual_quantize, use_backend
# Scores of vectors far from the origin cancel: their errors hide the nearest code, and the next residual.
x = 1000 + torch.randn(40, 20)
codebooks = torch.stack([1000 + torch.randn(100, 20), torch.randn(100, 20)])
with use_backend("reference"):
    expected = residual_quantize(x, codebooks)
with use_backend("triton"):
    exact, fast = (residual_quantize(x, codebooks, precision=precision) for precision in ("exact", "float32"))
assert torch.equal(exact.indices, expected.indices)
torch.testing.assert_close(exact.commitment_loss, expected.commitment_loss)
assert not torch.equal(fast.indices, expected.indices)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


class TorchKernels(TorchDispatchMode):
    """While active, list the operations of torch that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func.__name__.startswith(("empty", "new_empty")):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "exact"])
def test_residual_quantize_statistics_and_step_launch_at_most_eight_kernels(precision):
    x, codebooks, sizes = torch.randn(4_800, 128), torch.randn(8, 1_024, 128), torch.ones(8, 1_024)
    levels, mask = torch.ones(8, dtype=torch.bool), torch.ones(4_800, dtype=torch.bool)
    with (
        offline.driver_of(90),
        mock.patch.object(JITFunction, "run", return_value=None) as run,
        TorchKernels() as others,
    ):
        _, indices, *_ = operations.residual_quantize_fwd(x, codebooks, levels, mask, precision, "once")
        statistics = operations.residual_statistics(x, indices, codebooks)
        operations.ema_step(codebooks, sizes, torch.empty_like(codebooks), statistics, 0.99, 1e-5)
    assert run.call_count + len(others.names) <= 8, others.names


def test_topk_stream_candidate_lists_are_short():
    """A list of many codes holds little more than k; one that overflows, or has no threshold, is not used."""
    code = """
import torch
from dlvae_kernels.backends.triton.topk import stream
from dlvae_kernels.testing import assert_same_topk
from dlvae_kernels import topk_codes, use_backend
counts, original = [], stream.rank
def spy(*args, candidates, **options):
    counts.append((args[-1].tolist(), candidates.shape[1]))
    original(*args, candidates=candidates, **options)
stream.rank = spy
x, dictionary = torch.randn(40, 8), torch.randn(1024, 8)
with use_backend("triton"):
    assert_same_topk(*topk_codes(x, dictionary, 30), x, dictionary)
    [(found, capacity)] = counts
    assert 30 <= min(found) and max(found) < 60 < capacity, (found, capacity)
    dictionary[100:500] = x[0]
    x[1] = float("nan")
    indices, distances = topk_codes(x, dictionary, 30)
found, capacity = counts[1]
assert found[0] >= 400 > capacity and found[1] == 0, (found, capacity)
assert indices[0].tolist() == list(range(100, 130)) and not distances[0].any()
assert indices[1].tolist() == list(range(30)) and distances[1].isnan().all()
keep = torch.arange(40) != 1
assert_same_topk(indices[keep], distances[keep], x[keep], dictionary)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_topk_codes_large_k_is_unavailable(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, codes = torch.zeros(2, 3), torch.zeros(600, 3)
    assert unavailable_reason("triton", "topk_codes", x, codes, 256, "l2", None) is None
    assert unavailable_reason("triton", "topk_codes", x, codes[:512], 512, "l2", None) is None
    expected = "expected k of at most 256 for more than 512 codes, got 257"
    assert expected in unavailable_reason("triton", "topk_codes", x, codes, 257, "l2", None)

"""No layer allocates an N x K matrix, in forward or backward."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from benchmarks.results import ROOT
from benchmarks.sizes import DICTIONARY, SAE
from dlvae_kernels import DictionaryLearning, SparseAutoencoder, use_backend
from dlvae_kernels.backends import native
from dlvae_kernels.backends.triton import operations as kernels
from tests.allocations import Allocations, without_launching

# Elements of one chunk of scores or of gathered atoms of the reference.
CHUNK = 2**21


def allowed(n, num_atoms, d, k):
    """The largest number of elements that a tensor may have.

    That is the number of elements of x, of the dictionary with a row and a column more, of the selected coefficients,
    or of a chunk of the reference.
    """
    largest = max(n * d, (num_atoms + 1) * (d + 1), n * k, CHUNK)
    assert largest < n * num_atoms
    return largest


def on(device):
    """Force the reference on the CPU, since no hook sees allocations of compiled code; below its peak is measured."""
    return use_backend("reference") if device == "cpu" else nullcontext()


def dictionary_learning(n, num_atoms, d, k, device="cpu"):
    layer = DictionaryLearning(d, num_atoms, 0.1, k, representation="sparse", channel_last=True).to(device)
    x = torch.randn(n, d, device=device, requires_grad=True)
    with on(device), Allocations() as found:
        loss, reconstruction, _ = layer(x)
        (loss + reconstruction.sum()).backward()
    return found


def sparse_autoencoder(n, num_atoms, d, k, device="cpu"):
    layer = SparseAutoencoder(d, num_atoms, k).to(device)
    x = torch.randn(n, d, device=device, requires_grad=True)
    with on(device), Allocations() as found:
        out = layer(x)
        (out.reconstruction - x).square().mean().backward()
    assert {"dlvae.topk_codes.default", "dlvae.sparse_decode_bwd.default"} <= found.seen
    return found


def test_dictionary_learning_step_allocates_no_n_by_k_matrix():
    size = DICTIONARY.n, DICTIONARY.k, DICTIONARY.d, DICTIONARY.selected
    found = dictionary_learning(*size)
    assert found.elements <= allowed(*size), found.operation


def test_sparse_autoencoder_step_allocates_no_n_by_k_matrix():
    size = 4096, 4096, 64, 8
    found = sparse_autoencoder(*size)
    assert found.elements <= allowed(*size), found.operation


@pytest.mark.skipif(native.library_unavailable_reason() is not None, reason=str(native.library_unavailable_reason()))
@pytest.mark.parametrize(
    "layer",
    ["DictionaryLearning(48, K, 0.1, 8, representation='sparse', channel_last=True)", "SparseAutoencoder(48, K, 8)"],
)
def test_native_step_peak_memory_is_bounded(layer):
    code = f"""
import resource, torch
from dlvae_kernels import DictionaryLearning, SparseAutoencoder, use_backend
N, K = 4096, 32768
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with use_backend("native"):
    layer = {layer}
    def step(n):
        x = torch.randn(n, 48, requires_grad=True)
        sum(each.sum() for each in layer(x)[:2]).backward()
    step(64)
    before = peak()
    step(N)
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # An N x K matrix would take 512 MB.
    assert float(result.stdout) < 128


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sparse_autoencoder_full_size_allocates_no_n_by_k_matrix():
    size = SAE.n, SAE.k, SAE.d, SAE.selected
    found = sparse_autoencoder(*size, device="cuda")
    assert found.elements <= allowed(*size), found.operation


@pytest.mark.parametrize("size", [DICTIONARY, SAE], ids=str)
def test_triton_operations_allocate_no_n_by_k_matrix(size):
    """Each operation of the layers allocates less than an N x K matrix."""
    x, dictionary = torch.zeros(size.n, size.d), torch.zeros(size.k, size.d)
    with without_launching(), Allocations() as found:
        indices, values = kernels.topk_codes(x, dictionary, size.selected, "l2" if size == DICTIONARY else "dot", None)
        # No kernel ran, so the indices may lie out of range.
        indices.zero_()
        if size == DICTIONARY:
            values, sums = kernels.kept_softmax_fwd(x, dictionary, None, indices)
            kernels.kept_softmax_bwd(values, values, sums, x, dictionary, None, indices, True, True, True)
        kernels.sparse_decode_fwd(values, indices, dictionary)
        kernels.sparse_decode_bwd(x, values, indices, dictionary, True, True)
    assert found.elements < size.n * size.k, found.operation


def test_allocations_dense_matrix_is_recorded():
    x, codes = torch.randn(300, 4, requires_grad=True), torch.randn(200, 4)
    with Allocations() as found:
        products = x @ codes.T
    assert (found.elements, found.operation) == (60_000, "aten.mm.default")
    with Allocations() as found:
        products.gather(1, torch.zeros(300, 1).long()).sum().backward()
    assert found.elements == 60_000


def test_allocations_inside_operations_are_recorded():
    x, codes = torch.randn(300, 4), torch.randn(200, 4)
    with use_backend("reference"), Allocations() as found:
        torch.ops.dlvae.topk_codes(x, codes, 3, "dot", None)
    assert found.elements == 60_000  # one chunk of the reference
    assert {"dlvae.topk_codes.default", "aten.topk.default"} <= found.seen
    with Allocations() as found:
        torch.zeros(7).expand(1000, 7)
    assert found.elements == 7

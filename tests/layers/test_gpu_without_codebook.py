"""FSQ, LFQ, SimVQ and k-means on a GPU against the CPU, and without host synchronisation."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dlvae_kernels import FiniteScalarQuantizer, LookupFreeQuantizer, SimVQ, kmeans

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYERS = {
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 5], 16),
    "lfq": lambda: LookupFreeQuantizer(2**10, 16, inv_temperature=2.0),
    "bsq": lambda: LookupFreeQuantizer(2**10, 16, num_codebooks=2, spherical=True, inv_temperature=2.0),
    "sim_vq": lambda: SimVQ(16, 64),
    "sim_vq_rotation": lambda: SimVQ(16, 64, gradient="rotation"),
}


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """All outputs, the decoded indices, and the gradients."""
    x = x.clone().requires_grad_()
    out = layer(x)
    losses = [each for each in out if each.is_floating_point() and each.ndim == 0 and each.requires_grad]
    total = out.quantized.float().square().mean() + sum(losses)
    grads = torch.autograd.grad(total, [x, *layer.parameters()])
    return [*out, layer.decode(out.indices), *grads]


@pytest.mark.parametrize("name", LAYERS)
def test_layer_on_a_gpu_equals_the_cpu(name):
    on_cpu = LAYERS[name]()
    on_gpu, x = copy.deepcopy(on_cpu).cuda(), torch.randn(8, 16, 6, 6)
    for actual, expected in zip(results(on_gpu, x.cuda()), results(on_cpu, x), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_on_a_gpu_repeats_bitwise_and_never_synchronises(name, no_synchronisation):
    layer, x = LAYERS[name]().cuda(), torch.randn(8, 16, 6, 6, device="cuda")
    first = results(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    again = results(layer, x)
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, again))


def test_lloyd_on_a_gpu_equals_the_cpu_and_never_synchronises(no_synchronisation):
    lloyd = importlib.import_module("dlvae_kernels.layers.kmeans").lloyd
    x = torch.randn(4000, 8)
    # The last cluster starts empty.
    centroids = torch.cat([x[:15], torch.full((1, 8), 1e3)])
    device = x.cuda(), centroids.cuda()
    first = lloyd(*device, 4)
    torch.cuda.set_sync_debug_mode("error")
    again = lloyd(*device, 4)
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first[:3], again[:3]))
    expected = lloyd(x, centroids, 4)
    torch.testing.assert_close(first.centroids.cpu(), expected.centroids, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first.inertia.cpu(), expected.inertia, rtol=1e-4, atol=0)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_kmeans_on_a_gpu_repeats_bitwise(init):
    x = torch.randn(20_000, 8, device="cuda")
    first, again = kmeans(x, 64, init=init), kmeans(x, 64, init=init)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.indices, again.indices)
    assert len(first.indices.unique()) == 64

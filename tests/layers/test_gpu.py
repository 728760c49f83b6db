"""The layers on a GPU against the same layers on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from dlvae_kernels import (
    DictionaryLearning,
    SparseAutoencoder,
    VectorQuantizer,
    VectorQuantizerEMA,
    ema_update,
    vector_quantize,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYERS = {
    "gradient": lambda: VectorQuantizer(64, 16, 0.25, init="normal"),
    "ema": lambda: VectorQuantizerEMA(64, 16, 0.25, 0.9),
    "dictionary": lambda: DictionaryLearning(16, 64, 0.1, 5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_a_gpu_equal_the_cpu(name):
    on_cpu = LAYERS[name]()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x = torch.randn(8, 16, 6, 6)
    results = []
    for layer, inputs in ((on_cpu, x.clone()), (on_gpu, x.cuda())):
        inputs.requires_grad_()
        loss, out, *_ = layer(inputs)
        (loss + out.square().mean()).backward()
        results.append([t.detach().cpu() for t in (loss, out, inputs.grad, *layer.state_dict().values())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_autoencoder_on_a_gpu_equals_the_cpu(dtype):
    on_cpu = SparseAutoencoder(16, 64, 5)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x = torch.randn(200, 16).to(dtype)
    results = []
    for layer, inputs in ((on_cpu, x), (on_gpu, x.cuda())):
        out = layer(inputs)
        grads = torch.autograd.grad(out.reconstruction.float().square().mean(), list(layer.parameters()))
        results.append([each.detach().cpu().float() for each in (*out, *grads)])
    torch.testing.assert_close(*results, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_on_a_gpu_autocast_keeps_dtypes(name, dtype):
    layer = LAYERS[name]().cuda()
    x = torch.randn(8, 16, 6, 6, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        loss, out, *_ = layer(torch.nn.functional.conv2d(x, torch.ones(16, 1, 1, 1, device="cuda"), groups=16))
        assert out.dtype == dtype
        assert loss.dtype == torch.float32
    (loss + out.float().mean()).backward()
    assert torch.isfinite(x.grad).all()


def test_step_in_a_cuda_graph_equals_eager():
    x, codebook = torch.randn(300, 16, device="cuda"), torch.randn(200, 16, device="cuda")
    state = codebook.clone(), torch.ones(200, device="cuda"), codebook.clone()

    def step(x, codebook, cluster_size, embed_sum):
        out = vector_quantize(x, codebook)
        ema_update(codebook, cluster_size, embed_sum, x, out.indices, decay=0.9, epsilon=1e-5)
        return out.quantized, out.indices, out.commitment_loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x, *(each.clone() for each in state))
    torch.cuda.current_stream().wait_stream(side)
    static = [each.clone() for each in state]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, *static)
    for _ in range(3):
        x.normal_()
        graph.replay()
        expected = step(x, *state)
        for actual, other in zip((*captured, *static), (*expected, *state), strict=True):
            assert torch.equal(actual, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_vector_quantize_on_a_device_not_current_equals_the_cpu():
    x, codebook = torch.randn(300, 16, device="cuda:1"), torch.randn(200, 16, device="cuda:1")
    with torch.cuda.device(0):
        out = vector_quantize(x, codebook)
    assert out.quantized.device == x.device
    assert torch.equal(out.indices.cpu(), vector_quantize(x.cpu(), codebook.cpu()).indices)

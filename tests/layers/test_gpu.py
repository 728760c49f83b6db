"""The layers on a GPU against the same layers on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from dlvae_kernels import DictionaryLearning, VectorQuantizer, VectorQuantizerEMA

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYERS = {
    "gradient": lambda: VectorQuantizer(64, 16, 0.25, init="normal"),
    "ema": lambda: VectorQuantizerEMA(64, 16, 0.25, 0.9),
    "dictionary": lambda: DictionaryLearning(16, 64, 0.1, 5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_cpu(name):
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


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    layer = LAYERS[name]().cuda()
    x = torch.randn(8, 16, 6, 6, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        loss, out, *_ = layer(torch.nn.functional.conv2d(x, torch.ones(16, 1, 1, 1, device="cuda"), groups=16))
        assert out.dtype == dtype
        assert loss.dtype == torch.float32
    (loss + out.float().mean()).backward()
    assert torch.isfinite(x.grad).all()

from __future__ import annotations

import copy

import pytest
import torch

from dlvae_kernels import VectorQuantizerEMA

from ..oracles import notebook

K, D = 24, 6


@pytest.mark.small
def test_quantizer_ema_steps_equal_the_notebook():
    layer = VectorQuantizerEMA(K, D, 0.25, 0.9, epsilon=1e-3, dead_code_threshold=0)
    formula = notebook.VectorQuantizerEMA(layer.codebook, 0.25, 0.9, 1e-3)
    for _ in range(10):
        inputs = torch.randn(3, D, 4, 5, requires_grad=True)
        twin = inputs.detach().clone().requires_grad_()
        for function, x in ((layer, inputs), (formula, twin)):
            loss, quantized, *_ = function(x)
            (loss + quantized.square().sum()).backward()
        torch.testing.assert_close(inputs.grad, twin.grad)
        torch.testing.assert_close(layer.codebook, formula.codebook)
        torch.testing.assert_close(layer._ema_w, formula.sums)
        torch.testing.assert_close(layer._ema_cluster_size, formula.sizes)
    for actual, expected in zip(layer.eval()(inputs), formula.eval()(inputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_quantizer_ema_quantizes_with_the_codebook_before_the_update():
    layer = VectorQuantizerEMA(K, D, 0.25, 0.5, encodings="indices")
    before = layer.codebook.clone()
    _, quantized, _, indices = layer(torch.randn(3, D, 4, 5))
    assert torch.equal(quantized.movedim(1, -1), before[indices])
    assert not torch.equal(layer.codebook, before)


def test_quantizer_ema_first_step_moves_few_codes_a_little():
    layer = VectorQuantizerEMA(512, D, 0.25, 0.99)
    before = layer.codebook.clone()
    layer(torch.randn(1, D, 2, 2))
    assert (layer.codebook - before).abs().max() < 0.2
    assert (layer.codebook != before).any(1).sum() <= 4


def test_quantizer_ema_state_is_buffers_updated_in_place():
    layer = VectorQuantizerEMA(K, D, 0.25, 0.9)
    assert list(layer.parameters()) == []
    addresses = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    layer(torch.randn(3, D, 4, 5))
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == addresses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizer_ema_statistics_stay_float32(dtype):
    full, half = (VectorQuantizerEMA(K, D, 0.25, 0.99, dead_code_threshold=0) for _ in range(2))
    half.load_state_dict(full.state_dict())
    half = torch.nn.Sequential(half).to(dtype)[0]
    for name, value in half.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, full.state_dict()[name])
    for _ in range(300):
        x = torch.randn(2, D, 8, 8).to(dtype)
        _, quantized, *_ = half(x)
        full(x.float())
        assert quantized.dtype == dtype
    assert torch.equal(half._ema_cluster_size, full._ema_cluster_size)
    torch.testing.assert_close(half.codebook, full.codebook)


def test_quantizer_ema_float64_stays_float64():
    layer = VectorQuantizerEMA(K, D, 0.25, 0.9).double()
    layer(torch.randn(2, D, 4, 4, dtype=torch.float64))
    assert all(value.dtype == torch.float64 for value in layer.state_dict().values())


def test_quantizer_ema_dead_codes_stay_over_time():
    layer = VectorQuantizerEMA(2, 2, 0.25, 0.8, dead_code_threshold=0)
    with torch.no_grad():
        layer.codebook.copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
        layer._ema_w.copy_(layer.codebook)
    for _ in range(100):
        layer(torch.randn(1, 2, 16))
    assert layer.codebook[1].tolist() == [50, 50]


def test_quantizer_ema_converges_to_the_clusters():
    centres = 10 * torch.randn(4, D)
    layer = VectorQuantizerEMA(16, D, 0.25, 0.5, init="kmeans")
    for _ in range(40):
        x = centres[torch.randint(4, (64,))] + 0.01 * torch.randn(64, D)
        layer(x.T[None])
    assert (torch.cdist(centres, layer.codebook).amin(1) < 0.1).all()


def test_quantizer_ema_loads_a_notebook_checkpoint():
    torch.manual_seed(1)
    source = torch.nn.Module()
    source._embedding = torch.nn.Embedding(K, D)
    source._ema_w = torch.nn.Parameter(torch.randn(K, D))
    source.register_buffer("_ema_cluster_size", torch.full((K,), 3.0))
    layer = VectorQuantizerEMA(K, D, 0.25, 0.99, init="data", dead_code_threshold=1.0)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer.codebook, source._embedding.weight)
    assert torch.equal(layer._ema_w, source._ema_w)
    assert (layer._ema_cluster_size == 3).all()


def test_quantizer_ema_loading_by_assignment_leaves_the_callers_tensors():
    state = {
        "_embedding.weight": torch.nn.Parameter(torch.randn(K, D).bfloat16()),
        "_ema_w": torch.nn.Parameter(torch.randn(K, D)),
        "_ema_cluster_size": torch.zeros(K),
    }
    before = copy.deepcopy(state)
    layer = VectorQuantizerEMA(K, D, 0.25, 0.99)
    layer.load_state_dict(state, assign=True)
    layer(torch.randn(3, D, 4, 5))
    assert list(layer.parameters()) == []
    assert all(value.dtype == torch.float32 for value in layer.state_dict().values())
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_quantizer_ema_untrained_notebook_checkpoint_is_corrected():
    layer = VectorQuantizerEMA(K, D, 0.25, 0.99)
    state = {"_embedding.weight": torch.randn(K, D), "_ema_w": torch.randn(K, D), "_ema_cluster_size": torch.zeros(K)}
    layer.load_state_dict(copy.deepcopy(state))
    x = torch.randn(3, D, 4, 5)
    layer(x)
    # Each active code is the mean of its vectors, not a random sum over a small count.
    assert layer.codebook.abs().max() < 5


@pytest.mark.parametrize(
    ("decay", "epsilon", "message"),
    [
        (1.5, 1e-5, r"expected decay to lie in \[0, 1\], got 1.5"),
        (-0.1, 1e-5, r"expected decay to lie in \[0, 1\], got -0.1"),
        (0.9, -1, r"expected epsilon to be at least 0, got -1"),
    ],
)
def test_quantizer_ema_bad_arguments_raise(decay, epsilon, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizerEMA(K, D, 0.25, decay, epsilon)

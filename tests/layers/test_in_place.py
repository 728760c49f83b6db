"""The quantized or reconstructed map of a layer may be changed in place, as a decoder that begins with a ReLU does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dlvae_kernels import DictionaryLearning, ResidualVectorQuantizer, VectorQuantizer, VectorQuantizerEMA

K, D = 32, 8

LAYERS = {
    "vector_quantizer": lambda: VectorQuantizer(K, D, 0.25),
    "vector_quantizer_ema": lambda: VectorQuantizerEMA(K, D, 0.25, 0.9),
    "residual_vector_quantizer": lambda: ResidualVectorQuantizer(3, K, D, init="normal"),
    "dictionary_learning": lambda: DictionaryLearning(D, K, 0.1, 4),
    "dictionary_learning_direct": lambda: DictionaryLearning(D, K, 0.1, 4, gradient="direct"),
}

pytestmark = pytest.mark.small


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_changed_in_place_keeps_values_and_gradients(name, mode, channel_last):
    layer = LAYERS[name]().train(mode != "eval")
    layer._channel_last = channel_last
    x = torch.randn(2, 4, 4, D) if channel_last else torch.randn(2, D, 4, 4)
    x.requires_grad_(mode != "no_grad")
    like = copy.deepcopy(layer)
    with torch.set_grad_enabled(mode != "no_grad"):
        out, expected = nn.ReLU(inplace=True)(layer(x)[1]), like(x)[1].relu()
    assert torch.equal(out, expected)
    if mode != "no_grad":
        actual, exact = (torch.autograd.grad(each.square().sum(), x)[0] for each in (out, expected))
        torch.testing.assert_close(actual, exact)

"""Public attributes and the repr of the layers, and the remedies in their messages."""

from __future__ import annotations

import inspect

import pytest
import torch

from dlvae_kernels import (
    DictionaryLearning,
    ResidualVectorQuantizer,
    SparseAutoencoder,
    VectorQuantizer,
    VectorQuantizerEMA,
)

K, D = 8, 4
LAYERS = {
    "vector_quantizer": lambda **options: VectorQuantizer(K, D, 0.25, **options),
    "vector_quantizer_ema": lambda **options: VectorQuantizerEMA(K, D, 0.25, 0.9, **options),
    "residual_vector_quantizer": lambda **options: ResidualVectorQuantizer(3, K, D, **options),
    "dictionary_learning": lambda **options: DictionaryLearning(D, K, 0.1, 3, **options),
}

pytestmark = pytest.mark.small


@pytest.mark.parametrize("name", ["vector_quantizer", "vector_quantizer_ema"])
def test_quantizer_public_attributes_are_read_only(name):
    layer = LAYERS[name]()
    expected = {"num_embeddings": K, "embedding_dim": D, "commitment_cost": 0.25}
    if name == "vector_quantizer_ema":
        expected |= {"decay": 0.9, "epsilon": 1e-5}
        assert layer.cluster_size is layer._ema_cluster_size
        assert layer.embed_sum is layer._ema_w
    for attribute, value in expected.items():
        assert getattr(layer, attribute) == value
        with pytest.raises(AttributeError):
            setattr(layer, attribute, value)


@pytest.mark.parametrize("layer", [*(make() for make in LAYERS.values()), SparseAutoencoder(D, K, 3)])
def test_repr_shows_every_argument_of_the_constructor(layer):
    for argument in inspect.signature(type(layer)).parameters:
        assert f"{argument}=" in repr(layer)


def test_repr_of_a_quantizer_is_its_call():
    layer = VectorQuantizerEMA(K, D, 0.25, 0.9, encodings="indices", init="data", dead_code_threshold=1.0)
    assert repr(eval(repr(layer).splitlines()[1].strip().join(("VectorQuantizerEMA(", ")")))) == repr(layer)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("channel_last", [False, True])
def test_map_in_the_other_layout_raises_the_remedy(name, channel_last):
    layer = LAYERS[name](channel_last=channel_last)
    x = torch.zeros(2, D, 7) if channel_last else torch.zeros(2, 7, D)
    remedy = f"pass channel_last={not channel_last}"
    with pytest.raises(ValueError, match=rf"expected (x|inputs) of shape \[B, .*\], got .*; for .* {remedy}"):
        layer(x)
    with pytest.raises(ValueError, match=r"got \(2, 7, 7\)$"):
        layer(torch.zeros(2, 7, 7))

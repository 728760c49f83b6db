"""Initial state of the layers: from data, in place, on the meta device, by reset_parameters, in the default dtype."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlvae_kernels import (
    DictionaryLearning,
    GroupedResidualVectorQuantizer,
    ResidualVectorQuantizer,
    SparseAutoencoder,
    VectorQuantizer,
    VectorQuantizerEMA,
)

K, D = 8, 4

LAYERS = {
    "vector_quantizer": lambda: VectorQuantizer(K, D, 0.25, dead_code_threshold=1.0),
    "vector_quantizer_ema": lambda: VectorQuantizerEMA(K, D, 0.25, 0.9),
    "vector_quantizer_ema_projected": lambda: VectorQuantizerEMA(K, D, 0.25, 0.9, codebook_dim=3),
    "residual_vector_quantizer": lambda: ResidualVectorQuantizer(3, K, D, init="normal", codebook_dim=3),
    "grouped_residual_vector_quantizer": lambda: GroupedResidualVectorQuantizer(2, 3, K, D, init="normal"),
    "dictionary_learning": lambda: DictionaryLearning(D, K, 0.1, 3),
    "sparse_autoencoder": lambda: SparseAutoencoder(D, K, 3),
}
FROM_DATA = {
    "vector_quantizer": lambda init: VectorQuantizer(K, D, 0.25, init=init, dead_code_threshold=1e-9),
    "vector_quantizer_ema": lambda init: VectorQuantizerEMA(K, D, 0.25, 0.99, init=init),
}


@pytest.fixture
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("init", ["data", "kmeans"])
@pytest.mark.parametrize("name", FROM_DATA)
def test_training_keeps_a_codebook_that_was_set_in_place(name, init):
    layer = FROM_DATA[name](init)
    codes = torch.randn(K, D)
    with torch.no_grad():
        layer.codebook.copy_(codes)
    layer(100 + torch.randn(8, D, 2, 2))
    # The batch lies 100 away: with a decay of 0.99 no code has moved by more than 40 of that.
    assert float((layer.codebook.detach() - codes).abs().max()) < 40


@pytest.mark.parametrize("name", FROM_DATA)
def test_compiled_training_keeps_a_codebook_that_was_set_in_place(name):
    layer, like = FROM_DATA[name]("data"), FROM_DATA[name]("data")
    codes, x = torch.randn(K, D), 100 + torch.randn(8, D, 2, 2)
    for each in (layer, like):
        with torch.no_grad():
            each.codebook.copy_(codes)
    like(x)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    for key, value in state_of(like).items():
        torch.testing.assert_close(layer.state_dict()[key], value)


@pytest.mark.parametrize("init", ["data", "kmeans"])
@pytest.mark.parametrize("name", FROM_DATA)
def test_training_initialises_a_zero_codebook_from_data_once(name, init):
    layer = FROM_DATA[name](init)
    layer(100 + torch.randn(8, D, 2, 2))
    assert float(layer.codebook.min()) > 90
    before = layer.codebook.detach().clone()
    layer(torch.randn(8, D, 2, 2))
    assert float((layer.codebook - before).abs().max()) < 60


@pytest.mark.parametrize("name", FROM_DATA)
def test_reset_parameters_lets_the_codebook_await_data_again(name):
    layer = FROM_DATA[name]("data")
    layer(torch.randn(8, D, 2, 2))
    layer.reset_parameters()
    assert not layer.codebook.any()
    layer(100 + torch.randn(8, D, 2, 2))
    assert float(layer.codebook.min()) > 90


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_of_all_modules_after_to_empty_initialises_as_the_constructor(name):
    made = state_of(LAYERS[name]())
    with torch.device("meta"):
        layer = nn.Sequential(LAYERS[name]())
    layer.to_empty(device="cpu")
    for value in layer.state_dict().values():
        value.fill_(torch.nan)
    # Children come after their parents, as in FSDP2's recipe.
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    found = state_of(layer[0])
    assert found.keys() == made.keys()
    for key, value in found.items():
        assert value.isfinite().all(), key
        if "project" in key:  # too few numbers to compare their distribution
            assert value.any()
            continue
        # The distribution is the same; where it is a constant, the values are equal.
        torch.testing.assert_close(value.std(), made[key].std(), rtol=0.7, atol=1e-6, msg=key)
        assert float(value.abs().max()) <= 2 * float(made[key].abs().max()), key
    if name == "sparse_autoencoder":
        assert torch.equal(found["encoder.weight"], found["W_dec"])
    if name == "vector_quantizer_ema":
        assert torch.equal(found["_ema_w"], found["_embedding.weight"])


@pytest.mark.parametrize("init", ["normal", "kmeans"])
def test_loading_a_meta_state_dict_by_assignment_gives_meta_buffers(init):
    with torch.device("meta"):
        layer = VectorQuantizerEMA(K, D, 0.25, 0.9, init=init)
        layer.load_state_dict(VectorQuantizerEMA(K, D, 0.25, 0.9).state_dict(), assign=True)
    assert layer.codebook.is_meta


@pytest.mark.parametrize("name", LAYERS)
def test_layers_default_dtype_is_followed(default_float64, name):
    layer = LAYERS[name]()
    assert {value.dtype for value in layer.state_dict().values()} == {torch.float64}
    x = torch.randn(5, D) if name == "sparse_autoencoder" else torch.randn(2, D, 3, 3)
    layer(x)


def test_ema_statistics_stay_float32_where_the_default_is_bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = VectorQuantizerEMA(K, D, 0.25, 0.9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in layer.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("kind", [np.int64, np.int32, lambda n: torch.tensor(n)])
def test_sizes_any_integer_are_accepted(kind):
    layers = (
        VectorQuantizer(kind(K), kind(D), 0.25),
        VectorQuantizerEMA(kind(K), kind(D), 0.25, 0.9),
        DictionaryLearning(kind(D), kind(K), 0.1, kind(3)),
    )
    for layer in layers:
        layer(torch.randn(2, D, 3, 3))
        assert "np." not in repr(layer)
    SparseAutoencoder(kind(D), kind(K), kind(3))(torch.randn(5, D))


@pytest.mark.parametrize("size", [8.0, np.float64(8), True, "8", None])
def test_sizes_no_integers_raise(size):
    with pytest.raises(ValueError, match=r"expected num_embeddings to be an integer of at least 1, got .*"):
        VectorQuantizer(size, D, 0.25)

"""torch.export of the layers: gradients in train mode are those of eager code, or the export raises."""

from __future__ import annotations

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

K, D = 32, 8

LAYERS = {
    "vector_quantizer": lambda: VectorQuantizer(K, D, 0.25),
    "vector_quantizer_ema": lambda: VectorQuantizerEMA(K, D, 0.25, 0.9),
    "vector_quantizer_ema_dead_codes": lambda: VectorQuantizerEMA(K, D, 0.25, 0.9, dead_code_threshold=0.1),
    "residual_vector_quantizer": lambda: ResidualVectorQuantizer(3, K, D, init="normal"),
    "residual_vector_quantizer_gradient": lambda: ResidualVectorQuantizer(3, K, D, decay=None, init="normal"),
    "grouped_residual_vector_quantizer": lambda: GroupedResidualVectorQuantizer(2, 3, K, D, init="normal"),
    "dictionary_learning": lambda: DictionaryLearning(D, K, 0.1, 4),
    "dictionary_learning_direct": lambda: DictionaryLearning(D, K, 0.1, 4, gradient="direct"),
    "sparse_autoencoder": lambda: SparseAutoencoder(D, K, 4),
}


class Model(nn.Module):
    """A convolution before the layer, so that gradients have to pass through it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, D, 1)
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        if isinstance(self.layer, SparseAutoencoder):
            out = self.layer(h.movedim(1, -1))
            return out.values.sum(), out.reconstruction
        return self.layer(h)[:2]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss, out = model(x)
    (loss + out.square().sum()).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_export_train_mode_has_the_gradients_of_eager_code(name, strict):
    model = Model(LAYERS[name]())
    x = torch.randn(2, 3, 4, 4)
    exported = torch.export.export(model, (x,), strict=strict).module()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = gradients(model, x)
    # The graph shares the parameters and buffers of the model: both have to begin at the same codebook.
    model.load_state_dict(state)
    exported.load_state_dict(state)
    found = gradients(exported, x)
    assert found.keys() == expected.keys()
    assert found["encoder.weight"] is not None
    for key, gradient in expected.items():
        assert (found[key] is None) == (gradient is None), key
        if gradient is not None:
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_export_train_mode_updates_the_codebook_as_eager_code():
    model, like = Model(LAYERS["vector_quantizer_ema"]()), Model(LAYERS["vector_quantizer_ema"]())
    like.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 4, 4)
    exported = torch.export.export(model, (x,)).module()
    for _ in range(2):
        exported(x)
        like(x)
    for key, value in like.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[key], value, msg=key)


@pytest.mark.parametrize(
    "layer", [VectorQuantizer(K, D, 0.25, init="data"), VectorQuantizerEMA(K, D, 0.25, 0.9, init="kmeans")]
)
def test_export_train_mode_while_the_codebook_is_uninitialised_raises(layer):
    model, x = Model(layer), torch.randn(2, 3, 4, 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be exported in train mode before a training batch"):
        torch.export.export(model, (x,), strict=False)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.export.export(model.eval(), (x,))
    model.train()(x)
    torch.export.export(model, (x,))


def test_export_train_mode_while_ranks_all_reduce_raises(monkeypatch):
    monkeypatch.setattr("dlvae_kernels.layers.distributed.num_ranks", lambda sync: 2 if sync else 1)
    with pytest.raises(ValueError, match="cannot be exported in train mode while ranks all-reduce"):
        torch.export.export(Model(LAYERS["vector_quantizer_ema"]()), (torch.randn(2, 3, 4, 4),), strict=False)

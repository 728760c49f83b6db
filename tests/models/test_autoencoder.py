from __future__ import annotations

import pytest
import torch

from models.autoencoder import Decoder, Encoder, Residual, perplexity
from models.dlvae import DictionaryLearningVAE
from models.vqvae import VQVAE

SIZES = (16, 2, 4)
NOTEBOOK_SIZES = (128, 2, 32)


def test_encoder_and_decoder_have_shapes_of_notebook():
    x = torch.randn(2, 3, 32, 32)
    latents = Encoder(3, *NOTEBOOK_SIZES)(x)
    assert latents.shape == (2, 128, 8, 8)
    assert Decoder(128, *NOTEBOOK_SIZES)(latents).shape == x.shape


def test_state_dict_has_keys_and_shapes_of_notebook():
    state = DictionaryLearningVAE(*NOTEBOOK_SIZES, 512, 256).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["_encoder._conv_1.weight"] == (64, 3, 4, 4)
    assert shapes["_encoder._residual_stack._layers.1._block.1.weight"] == (32, 128, 3, 3)
    assert shapes["_pre_vq_conv.weight"] == (256, 128, 1, 1)
    assert shapes["_dl.dictionary"] == (512, 256)
    assert shapes["_dl.representation.0.weight"] == (512, 256)
    assert shapes["_decoder._conv_trans_2.weight"] == (64, 3, 4, 4)
    assert len(shapes) == 25


def test_residual_adds_rectified_input_as_in_notebook():
    block = Residual(8, 8, 4)
    x = torch.randn(2, 8, 5, 5)
    rectified = x.relu()
    expected = rectified + block._block[3](block._block[1](rectified).relu())
    torch.testing.assert_close(block(x.clone()), expected)


@pytest.mark.small
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_vqvae_trains_and_encodes(decay):
    model = VQVAE(*SIZES, 32, 8, 0.25, decay)
    x = torch.randn(2, 3, 32, 32)
    loss, reconstruction, perplexity_of_batch = model(x)
    assert reconstruction.shape == x.shape
    assert 1 <= perplexity_of_batch <= 32
    (loss + reconstruction.square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.codes.requires_grad == (decay == 0)
    coding = model.eval().code(model.encode(x))
    assert coding.indices.shape == (2, 8, 8)
    assert coding.nonzeros() == 128
    torch.testing.assert_close(model.decode(coding.latents), model(x)[1])


@pytest.mark.small
@pytest.mark.parametrize("gradient", ["straight_through", "direct"])
def test_dlvae_trains_and_encodes(gradient):
    model = DictionaryLearningVAE(*SIZES, 32, 8, 0.1, 5, gradient=gradient)
    x = torch.randn(2, 3, 32, 32)
    loss, reconstruction, (values, indices) = model(x)
    assert values.shape == indices.shape == (2, 8, 8, 5)
    (loss + reconstruction.square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
    coding = model.code(model.encode(x))
    assert coding.counts(32).sum() == coding.nonzeros() == 2 * 64 * 5


def test_vqvae_with_one_channel_reconstructs_shape():
    model = VQVAE(*SIZES, 32, 8, 0.25, 0.9, in_channels=1)
    assert model(torch.randn(2, 1, 28, 28))[1].shape == (2, 1, 28, 28)


def test_perplexity_of_counts_equals_value_by_hand():
    assert perplexity(torch.tensor([2, 1, 1, 0])).item() == pytest.approx(2**1.5)
    assert perplexity(torch.zeros(3)).item() == 1

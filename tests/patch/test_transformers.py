"""The classes of transformers and diffusers, from small configurations with random codebooks.

A token is that of the class, or a float64 search agrees with the patched method.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from dlvae_kernels import patch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


def get(model, name):
    """A class of a model of transformers."""
    try:
        return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)
    except ImportError as error:
        pytest.skip(f"this version of transformers has no {name}, or it needs another package: {error}")


def filled(module):
    """Random codebooks, which these classes initialise with zeros or leave uninitialised."""
    for each in module.modules():
        for name, value in [*each._buffers.items(), *each._parameters.items()]:
            if name in ("embed", "embed_sum", "codevectors"):
                value.data.normal_()
    return module.eval()


CODES = SimpleNamespace(codebook_size=128, codebook_dim=16, num_quantizers=4, frame_rate=50, hidden_size=24)
IMAGE = SimpleNamespace(
    num_embeddings=256, embed_dim=8, beta=0.25, num_patches=4, codebook_size=256, codebook_dim=16, latent_channels=8
)
# For each class: its configuration, the shape of the input, the method that a model calls, and the patched methods.
CASES = {
    ("encodec", "EncodecResidualVectorQuantizer"): (
        lambda: transformers.EncodecConfig(codebook_size=128, codebook_dim=16, hidden_size=16),
        (2, 16, 100),
        "encode",
        {"encode": 1, "quantize": 45},
    ),
    ("xcodec", "XcodecResidualVectorQuantization"): (
        lambda: CODES,
        (2, 16, 100),
        "encode",
        {"encode": 1, "quantize": 4},
    ),
    ("wavtokenizer", "WavTokenizerVectorQuantization"): (lambda: CODES, (2, 16, 100), "encode", {"quantize": 1}),
    ("higgs_audio_v2_tokenizer", "HiggsAudioV2TokenizerResidualVectorQuantization"): (
        lambda: CODES,
        (2, 24, 100),
        "encode",
        {"quantize": 4},
    ),
    ("mimi", "MimiSplitResidualVectorQuantizer"): (
        lambda: transformers.MimiConfig(
            codebook_size=128, codebook_dim=16, hidden_size=24, vector_quantization_hidden_dimension=16
        ),
        (2, 24, 100),
        "encode",
        {"encode": 2, "quantize": 32},
    ),
    ("dac", "DacResidualVectorQuantizer"): (
        lambda: transformers.DacConfig(codebook_size=128, hidden_size=24),
        (2, 24, 100),
        "forward",
        {"decode_latents": 9},
    ),
    **{
        (model, name): (lambda: IMAGE, (2, *depth, 8, 6, 5), "forward", {"forward": 1})
        for model, name, depth in [
            ("chameleon", "ChameleonVQVAEVectorQuantizer", ()),
            ("janus", "JanusVQVAEVectorQuantizer", ()),
            ("glm_image", "GlmImageVQVAEVectorQuantizer", ()),
            ("emu3", "Emu3VQVAEVectorQuantizer", (3,)),
            ("apertus1p5", "Apertus1p5VisionTokenizerVectorQuantizer", ()),
        ]
    },
    **{
        (model, f"{name}GumbelVectorQuantizer"): (
            lambda name=name: getattr(transformers, f"{name}Config")(
                num_codevectors_per_group=32, hidden_size=512, num_attention_heads=8
            ),
            (2, 40, 512),
            "forward",
            {"forward": 1},
        )
        for model, name in [
            ("wav2vec2", "Wav2Vec2"),
            ("wav2vec2_conformer", "Wav2Vec2Conformer"),
            ("unispeech", "UniSpeech"),
            ("unispeech_sat", "UniSpeechSat"),
            ("wavlm", "WavLM"),
        ]
    },
}


def assert_same(module, method, x, methods):
    stock = getattr(module, method)(x)
    patched = patch(module, verify=lambda: getattr(module, method)(x))
    names = [each.handler.method for each in patched.changes]
    assert {name: names.count(name) for name in names} == methods, str(patched)
    for each in patched.comparisons:
        assert each.tokens > 0
        assert each.patched == each.differing, str(each)
    if not any(each.differing for each in patched.comparisons):
        torch.testing.assert_close(getattr(module, method)(x), stock, rtol=1e-4, atol=1e-5)
    patched.undo()


@pytest.mark.parametrize(("model", "name"), CASES)
def test_class_of_transformers_gives_the_same_results(model, name):
    config, shape, method, methods = CASES[model, name]
    module = filled(get(model, name)(config()))
    assert_same(module, method, torch.randn(shape), methods)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("model", "name"), CASES)
def test_class_of_transformers_in_half_precision_is_exact(model, name, dtype):
    config, shape, method, methods = CASES[model, name]
    module = filled(get(model, name)(config())).to(dtype)
    patched = patch(module, verify=lambda: getattr(module, method)(torch.randn(shape).to(dtype)))
    assert len(patched.changes) == sum(methods.values()), str(patched)
    for each in patched.comparisons:
        assert each.patched == each.differing, str(each)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("sane_index_shape", [False, True])
def test_quantizer_of_diffusers_gives_the_same_results(legacy, sane_index_shape):
    vae = pytest.importorskip("diffusers.models.autoencoders.vae", reason="diffusers is not installed")
    module = vae.VectorQuantizer(256, 8, 0.25, legacy=legacy, sane_index_shape=sane_index_shape)
    assert_same(module, "forward", torch.randn(2, 8, 6, 5), {"forward": 1})


def test_model_of_transformers_encodes_the_same_tokens():
    config = transformers.EncodecConfig(num_filters=4, codebook_size=64, codebook_dim=16, hidden_size=16)
    model = filled(transformers.EncodecModel(config))
    audio = torch.randn(1, 1, 4800)
    with torch.no_grad():
        expected = model.encode(audio, bandwidth=24.0).audio_codes
        with patch(model, verify=lambda: model.encode(audio, bandwidth=24.0)) as patched:
            assert all(each.differing == each.patched for each in patched.comparisons)
            found = model.encode(audio, bandwidth=24.0).audio_codes
    assert (found != expected).float().mean() <= sum(each.differing for each in patched.comparisons)
    assert found.shape == expected.shape

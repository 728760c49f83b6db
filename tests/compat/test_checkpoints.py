"""Checkpoints in the layouts of the releases of vector-quantize-pytorch load strictly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own

# The shape and dtype of `initted`. All other names, shapes and dtypes are the same in releases 1.14.41, 1.17.8, 1.26.0
# and 1.32.0.
FLAGS = {
    "1.14": ((1,), torch.float32),
    "1.17": ((1,), torch.float32),
    "1.26": ((1,), torch.float32),
    "1.32": ((), torch.bool),
}
PLAIN = {"_codebook.cluster_size": (1, 4), "_codebook.embed_avg": (1, 4, 6), "_codebook.embed": (1, 4, 6)}
NARROW = {"_codebook.cluster_size": (1, 4), "_codebook.embed_avg": (1, 4, 3), "_codebook.embed": (1, 4, 3)}
SEPARATE = {"_codebook.cluster_size": (2, 4), "_codebook.embed_avg": (2, 4, 3), "_codebook.embed": (2, 4, 3)}
OUTPUT = {"project_out.weight": (6, 3), "project_out.bias": (6,)}
PROJECTIONS = {"project_in.weight": (3, 6), "project_in.bias": (3,), **OUTPUT}
NORMALISED = {
    "project_in.0.weight": (3, 6),
    "project_in.0.bias": (3,),
    "project_in.1.weight": (3,),
    "project_in.1.bias": (3,),
    **OUTPUT,
}
LEVELS = ("layers.0.", "layers.1.")
GROUPS = tuple(f"rvqs.{group}.{level}" for group in range(2) for level in LEVELS)
HEADS = {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": 3}
# Each layout: class, arguments, the shapes of a codebook, the prefixes of the codebooks, and other shapes.
LAYOUTS = {
    "plain": ("VectorQuantize", {}, PLAIN, [""], {}),
    "separate": ("VectorQuantize", HEADS, SEPARATE, [""], {}),
    "projected": ("VectorQuantize", {"codebook_dim": 3}, NARROW, [""], PROJECTIONS),
    "layernorm": (
        "VectorQuantize",
        {"codebook_dim": 3, "layernorm_after_project_in": True},
        NARROW,
        [""],
        NORMALISED,
    ),
    "cosine": ("VectorQuantize", {"use_cosine_sim": True}, PLAIN, [""], {}),
    "kmeans": ("VectorQuantize", {"kmeans_init": True}, PLAIN, [""], {}),
    "learnable": ("VectorQuantize", {"learnable_codebook": True, "ema_update": False}, PLAIN, [""], {}),
    "orthogonal": ("VectorQuantize", {"orthogonal_reg_weight": 1.0}, PLAIN, [""], {}),
    "residual": ("ResidualVQ", {}, PLAIN, LEVELS, {}),
    "residual_shared": ("ResidualVQ", {"shared_codebook": True}, PLAIN, LEVELS, {}),
    "residual_kmeans": ("ResidualVQ", {"kmeans_init": True}, PLAIN, LEVELS, {}),
    "residual_projected": ("ResidualVQ", {"codebook_dim": 3}, NARROW, LEVELS, PROJECTIONS),
    "grouped": ("GroupedResidualVQ", {"groups": 2}, NARROW, GROUPS, {}),
}


def make(name):
    cls, arguments, *_ = LAYOUTS[name]
    levels = {} if cls == "VectorQuantize" else {"num_quantizers": 2}
    return getattr(own, cls)(dim=6, codebook_size=4, **levels, **arguments)


def checkpoint(name, release, initialised=True):
    """A checkpoint of a release; codes of cosine quantizers and those that are shared are as in training."""
    _, arguments, shapes, prefixes, others = LAYOUTS[name]
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in others.items()}
    parts = {key: torch.rand(shape, generator=generator) + 0.5 for key, shape in shapes.items()}
    for place, prefix in enumerate(prefixes):
        factor = 1 if arguments.get("shared_codebook") else place + 1
        state |= {prefix + key: part * factor for key, part in parts.items()}
        shape, dtype = FLAGS[release]
        state[f"{prefix}_codebook.initted"] = torch.full(shape, initialised).to(dtype)
        if arguments.get("use_cosine_sim"):
            codes = f"{prefix}_codebook.embed"
            state[codes] = torch.nn.functional.normalize(state[codes], dim=-1)
    return state


def assert_loaded(layer, state):
    loaded = layer.state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        expected = value.reshape(()).bool() if key.endswith("initted") else value
        assert torch.equal(loaded[key], expected), key
    layer.train()
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1))
    quantized, _, loss = layer(x.requires_grad_())
    (quantized.sum() + loss.sum()).backward()
    assert x.grad.isfinite().all()
    assert all(value.isfinite().all() for value in layer.state_dict().values())


@pytest.mark.parametrize("release", FLAGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_checkpoint_of_a_release_loads_strictly(name, release):
    layer, state = make(name), checkpoint(name, release)
    before = copy.deepcopy(state)
    layer.load_state_dict(state, strict=True)
    assert_loaded(layer, before)
    assert all(torch.equal(value, before[key]) for key, value in state.items())


@pytest.mark.parametrize("release", ["1.17", "1.32"])
@pytest.mark.parametrize("construction", ["cpu", "meta"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_checkpoint_of_a_release_loads_by_assignment(name, construction, release):
    with torch.device(construction):
        layer = make(name)
    state = checkpoint(name, release)
    before = copy.deepcopy(state)
    layer.load_state_dict(state, strict=True, assign=True)
    assert_loaded(layer, before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("release", ["1.17", "1.32"])
@pytest.mark.parametrize("name", ["kmeans", "plain", "residual_kmeans", "grouped"])
def test_checkpoint_of_an_uninitialised_codebook_asks_for_kmeans_in_training(name, release, assign):
    layer = make(name)
    layer.load_state_dict(checkpoint(name, release, initialised=False), assign=assign)
    x = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(1)) + 100
    layer.eval()(x)
    flags = [value for key, value in layer.state_dict().items() if key.endswith("initted")]
    assert not any(flags)
    layer.train()(x)
    assert all(value for key, value in layer.state_dict().items() if key.endswith("initted"))
    assert_close(layer.eval()(x)[0], x, rtol=0, atol=5)

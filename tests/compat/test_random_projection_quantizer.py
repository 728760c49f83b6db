"""RandomProjectionQuantizer of the compatibility package against vector-quantize-pytorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from dlvae_kernels.compat.vector_quantize_pytorch import RandomProjectionQuantizer

from .comparison import compare

DIM, K = 12, 32
stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

OPTIONS = {
    "one_codebook": {"codebook_dim": 8},
    "four_codebooks": {"codebook_dim": 6, "num_codebooks": 4},
    "without_norm": {"codebook_dim": 6, "num_codebooks": 2, "norm": False},
    "options_of_vector_quantize": {"codebook_dim": 5, "num_codebooks": 3, "decay": 0.5, "threshold_ema_dead_code": 2},
    "learned_codes": {"codebook_dim": 5, "num_codebooks": 2, "orthogonal_reg_weight": 0.1},
}


def pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    both = []
    for make in (stock.RandomProjectionQuantizer, RandomProjectionQuantizer):
        torch.manual_seed(1)
        both.append(make(dim=DIM, codebook_size=K, **OPTIONS[name]))
    return both[0], both[1]


@pytest.mark.parametrize("name", OPTIONS)
def test_random_projection_quantizer_labels_as_vector_quantize_pytorch(name):
    like, module = pair(name)
    # One seed gives the same weights; the unit length of a code is rounded.
    for key, value in like.state_dict().items():
        assert_close(module.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    inputs = [3 * torch.randn(2, 40, DIM) + 1 for _ in range(2)]
    before = copy.deepcopy(like.state_dict())
    compare(like, module, inputs)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert not module.vq.training


@pytest.mark.parametrize("name", OPTIONS)
def test_random_projection_quantizer_cross_entropy_trains_as_vector_quantize_pytorch(name):
    like, module = pair(name)
    heads = OPTIONS[name].get("num_codebooks", 1)
    labels = torch.randint(-1, K, (2, 40, heads) if heads > 1 else (2, 40))
    compare(like, module, [torch.randn(2, 40, DIM) for _ in range(2)], indices=labels)


def test_random_projection_quantizer_label_is_the_code_of_the_largest_cosine():
    module = RandomProjectionQuantizer(dim=DIM, codebook_size=K, codebook_dim=6)
    x = torch.randn(3, 20, DIM).double()
    unit = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    cosines = (unit @ module.rand_projs[0].double()) @ module.vq.codebook[0].double().T
    assert torch.equal(module(x.float()), cosines.argmax(-1))


def test_mended_autocast_labels_are_those_of_float32():
    like, module = pair("four_codebooks")
    x = torch.randn(4, 500, DIM)
    expected = module(x)
    with torch.autocast("cpu"):
        found, found_like = module(x), like(x)
    assert torch.equal(found, expected)
    assert (found_like != expected).any()


def test_mended_maps_and_single_vectors_have_labels():
    like, module = pair("four_codebooks")
    for shape in ((2, 4, 5, DIM), (6, DIM)):
        x = torch.randn(shape)
        with pytest.raises(RuntimeError, match="number of subscripts"):
            like(x)
        assert torch.equal(module(x).flatten(0, -2), module(x.view(1, -1, DIM))[0])


def test_random_projection_quantizer_compiles_exports_and_pickles():
    _, module = pair("four_codebooks")
    x = torch.randn(2, 10, DIM)
    expected = module.train()(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    others = [compiled, torch.export.export(module, (x,)).module(), copy.deepcopy(module)]
    for other in [*others, pickle.loads(pickle.dumps(module))]:
        assert torch.equal(other(x), expected)


def test_random_projection_quantizer_half_precision_has_the_labels_of_its_weights():
    _, module = pair("four_codebooks")
    half = copy.deepcopy(module).bfloat16()
    x = torch.randn(2, 30, DIM).bfloat16()
    module.load_state_dict(half.state_dict())
    assert_close(half(x), module(x.float()))


def test_random_projection_quantizer_errors_name_the_argument():
    with pytest.raises(ValueError, match="expected kmeans_init=False"):
        RandomProjectionQuantizer(dim=DIM, codebook_size=K, codebook_dim=6, kmeans_init=True)
    with pytest.raises(TypeError, match="unknown argument 'colour'"):
        RandomProjectionQuantizer(dim=DIM, codebook_size=K, codebook_dim=6, colour=1)
    with pytest.raises(ValueError, match=r"expected x of shape \[b, ..., 12\], got \(2, 5\)"):
        RandomProjectionQuantizer(dim=DIM, codebook_size=K, codebook_dim=6)(torch.randn(2, 5))

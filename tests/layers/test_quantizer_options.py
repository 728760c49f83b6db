"""Heads, cosine, projections, masks and index dtypes of both vector quantizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dlvae_kernels import VectorQuantizer, VectorQuantizerEMA

K, D, H = 16, 6, 3

both = pytest.mark.parametrize("kind", ["gradient", "ema"])


def make(kind: str, dim: int = D, **options) -> nn.Module:
    options = {"encodings": "indices", "dead_code_threshold": 0, "init": "normal"} | options
    if kind == "gradient":
        return VectorQuantizer(K, dim, 0.25, **options)
    return VectorQuantizerEMA(K, dim, 0.25, 0.8, **options)


def gradient_of(layer: nn.Module, x: Tensor, weights: Tensor, loss_weight: float = 1) -> Tensor:
    x = x.detach().requires_grad_()
    out = copy.deepcopy(layer)(x)
    return torch.autograd.grad(loss_weight * out.loss + (out.quantized * weights).sum(), x)[0]


@both
def test_heads_are_one_quantizer_a_head(kind):
    layer = make(kind, num_heads=H)
    singles = [make(kind, D // H) for _ in range(H)]
    for head, single in enumerate(singles):
        single.load_state_dict({name: value[head] for name, value in layer.state_dict().items()})
    x = torch.randn(4, D, 5, 5)
    weights = torch.randn(x.shape)
    expected = [gradient_of(*each) for each in zip(singles, x.chunk(H, 1), weights.chunk(H, 1), strict=True)]
    # The loss is a mean over the elements of all heads.
    torch.testing.assert_close(gradient_of(layer, x, weights, H), torch.cat(expected, 1))
    for _ in range(3):
        x = torch.randn(4, D, 5, 5)
        out, outs = layer(x), [single(part) for single, part in zip(singles, x.chunk(H, 1), strict=True)]
        assert torch.equal(out.encodings, torch.stack([each.encodings for each in outs], -1))
        torch.testing.assert_close(out.quantized, torch.cat([each.quantized for each in outs], 1))
        torch.testing.assert_close(out.loss, sum(each.loss for each in outs) / H)
        torch.testing.assert_close(out.perplexity, sum(each.perplexity for each in outs) / H)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, torch.stack([single.state_dict()[name] for single in singles]), msg=name)
    assert torch.equal(layer.decode(layer.encode(x)), layer.eval()(x).quantized)
    assert layer.usage.perplexity.shape == (H,)


@both
def test_heads_with_a_shared_codebook_are_vectors_of_one_quantizer(kind):
    layer, single = make(kind, num_heads=H, shared_codebook=True), make(kind, D // H)
    single.load_state_dict(layer.state_dict())
    for _ in range(3):
        x = torch.randn(4, D, 25)
        y = x.movedim(1, -1).reshape(-1, D // H)
        out, expected = layer(x), single(y)
        assert torch.equal(out.encodings.flatten(), expected.encodings)
        torch.testing.assert_close(out.loss, expected.loss)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, single.state_dict()[name], msg=name)
    assert torch.equal(layer.decode(layer.encode(x)), layer.eval()(x).quantized)


@both
def test_cosine_quantizes_directions_by_codes_of_length_one(kind):
    layer = make(kind, metric="cosine")
    x = torch.randn(4, D, 50) * torch.rand(4, 1, 50) * 10
    for _ in range(3):
        out = layer(x)
    torch.testing.assert_close(out.quantized.norm(dim=1), torch.ones(4, 50))
    layer.eval()
    cosines = normalize(x, dim=1).movedim(1, -1) @ normalize(layer.codebook, dim=-1).T
    assert torch.equal(layer(x).encodings, cosines.argmax(-1))
    torch.testing.assert_close(layer.decode(layer.encode(x)), layer(x).quantized)
    # The gradient of the inputs passes through their normalisation, and so is orthogonal to them.
    gradient = gradient_of(layer, x, torch.randn(x.shape))
    assert float((gradient * x).sum(1).abs().max()) < 1e-2
    if kind == "ema":
        torch.testing.assert_close(layer.codebook.norm(dim=-1), torch.ones(K))


@both
def test_rotation_passes_the_rotated_gradient(kind):
    layer, x, weights = make(kind, gradient="rotation"), torch.randn(4, D, 5), torch.randn(4, D, 5)
    straight = make(kind)
    straight.load_state_dict(layer.state_dict())
    codes = layer.decode(layer.encode(x))
    gradient, unchanged = gradient_of(layer, x, weights, 0), gradient_of(straight, x, weights, 0)
    # A rotation keeps the length, and the scale is |q| / |x|.
    scale = codes.norm(dim=1) / x.norm(dim=1)
    torch.testing.assert_close(gradient.norm(dim=1), scale * unchanged.norm(dim=1))
    assert not torch.allclose(gradient, unchanged)


@both
@pytest.mark.parametrize("heads", [1, H])
def test_codebook_dim_projects_to_the_codes_and_back(kind, heads):
    layer = make(kind, num_heads=heads, codebook_dim=4)
    x = torch.randn(4, D, 50)
    out = layer(x)
    assert out.quantized.shape == x.shape
    assert layer.codebook.shape[-1] == 4
    out.quantized.sum().backward()
    assert layer.project_in.weight.grad.abs().sum() > 0
    layer.eval()
    torch.testing.assert_close(layer.decode(layer.encode(x)), layer(x).quantized)


@both
@pytest.mark.parametrize("options", [{}, {"num_heads": H}, {"num_heads": H, "shared_codebook": True}])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_masked_positions_are_as_if_absent(kind, options, metric):
    layer = make(kind, metric=metric, **options)
    like = copy.deepcopy(layer)
    x, mask = torch.randn(1, D, 30), torch.rand(1, 30) < 0.6
    y = x.clone()
    y[:, :, ~mask[0]] = torch.nan
    out, expected = layer(y, mask), like(x[:, :, mask[0]])
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.quantized[:, :, mask[0]], expected.quantized)
    assert not out.quantized[:, :, ~mask[0]].any()
    assert torch.equal(out.encodings[mask], expected.encodings[0])
    assert (out.encodings[~mask] == -1).all()
    torch.testing.assert_close(out.perplexity, expected.perplexity)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, like.state_dict()[name], msg=name)


@both
@pytest.mark.parametrize("options", [{"codebook_dim": 4}, {"metric": "cosine"}, {"codebook_dim": 4, "num_heads": H}])
def test_masked_nan_reaches_no_gradient(kind, options):
    layer, x, mask = make(kind, **options), torch.randn(2, D, 30), torch.rand(2, 30) < 0.6
    x.movedim(1, -1)[~mask] = torch.nan
    x.requires_grad_()
    out = layer(x, mask)
    assert not out.quantized.movedim(1, -1)[~mask].any()
    (out.loss + out.quantized.square().sum()).backward()
    assert all(value.grad.isfinite().all() for value in (x, *layer.parameters()))
    assert not x.grad.movedim(1, -1)[~mask].any()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cosine_of_a_zero_vector_has_no_gradient(kind, dtype):
    layer, x = make(kind, metric="cosine"), torch.randn(2, D, 30, dtype=dtype)
    x[0, :, 0] = 0
    x[0, :, 1] *= 1e4
    x.requires_grad_()
    out = layer(x)
    assert out.quantized.dtype == dtype
    (out.loss + out.quantized.float().sum()).backward()
    assert x.grad.isfinite().all()
    assert not x.grad[0, :, 0].any()


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_codebook_dim_takes_half_precision_and_ignores_autocast(kind, dtype, autocast):
    layer, x = make(kind, codebook_dim=4), torch.randn(2, D, 30)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert layer(x).quantized.dtype == torch.float32
        assert layer(x.to(dtype)).quantized.dtype == dtype


@both
@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_batch_without_a_valid_vector_initialises_nothing(kind, init):
    layer, x = make(kind, init=init), torch.randn(2, D, 30)
    layer(x, torch.zeros(2, 30, dtype=torch.bool))
    assert not layer.codebook.any()
    layer(x)
    assert layer.codebook.any()


@both
def test_meta_layer_with_assigned_state_trains(kind):
    state = make(kind, codebook_dim=4).state_dict()
    with torch.device("meta"):
        layer = make(kind, codebook_dim=4)
    layer.load_state_dict(state, assign=True)
    layer(torch.randn(2, D, 30))
    assert int(layer.usage.revived) == 0


def test_ema_without_decay_raises():
    with pytest.raises(ValueError, match=r"expected decay to lie in \[0, 1\], got None; VectorQuantizer learns"):
        VectorQuantizerEMA(K, D, 0.25, None)


@both
@pytest.mark.parametrize("init", ["data", "kmeans"])
@pytest.mark.parametrize("options", [{}, {"num_heads": H}, {"num_heads": H, "shared_codebook": True}])
def test_masked_positions_neither_initialise_nor_revive(kind, init, options):
    layer = make(kind, init=init, dead_code_threshold=1.0, **options)
    x, mask = torch.randn(2, D, 30), torch.rand(2, 30) < 0.6
    x.movedim(1, -1)[~mask] = 100
    for _ in range(5):
        layer(x, mask)
    assert float(layer.codebook.detach().abs().max()) < 10


@both
@pytest.mark.parametrize(
    "options", [{"metric": "cosine"}, {"codebook_dim": 4}, {"num_heads": H, "gradient": "rotation"}]
)
@pytest.mark.parametrize("init", ["normal", "kmeans"])
def test_first_steps_with_revival_have_gradients(kind, init, options):
    layer = make(kind, init=init, dead_code_threshold=1.0, **options)
    x = torch.randn(2, D, 30, requires_grad=True)
    outs = [layer(x), layer(x)]
    sum(out.loss + out.quantized.sum() for out in outs).backward()
    assert x.grad.isfinite().all()
    if options == {"metric": "cosine"} and kind == "ema":
        torch.testing.assert_close(layer.codebook.norm(dim=-1), torch.ones(K))


@both
def test_index_dtypes_decode_alike(kind):
    x = torch.randn(2, D, 20)
    layers = {dtype: make(kind, index_dtype=dtype).eval() for dtype in (torch.int64, torch.int32, torch.uint16)}
    for dtype, layer in layers.items():
        layer.load_state_dict(layers[torch.int64].state_dict())
        indices = layer(x).encodings
        assert indices.dtype == dtype
        assert torch.equal(layer.decode(indices), layers[torch.int64](x).quantized)


@both
@pytest.mark.parametrize("options", [{"num_heads": H}, {"metric": "cosine"}, {"codebook_dim": 4}])
def test_options_compile_and_export(kind, options):
    layer = make(kind, **options, init="kmeans")
    x = torch.randn(4, D, 50)
    layer(x)
    twin = copy.deepcopy(layer)
    out, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), twin(x)
    torch.testing.assert_close(out.loss, expected.loss)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, msg=name)
    for mode in (True, False):
        exported = torch.export.export(layer.train(mode), (x,)).module()
        twin.load_state_dict(layer.state_dict())
        torch.testing.assert_close(exported(x)[1], twin.train(mode)(x).quantized)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4}, "expected embedding_dim to be a multiple of num_heads, got 6 and 4; pass codebook_dim"),
        ({"metric": "dot"}, "expected metric to be one of 'euclidean', 'cosine', got 'dot'"),
        ({"index_dtype": torch.float32}, "expected index_dtype to be one of torch.int64, torch.int32, torch.uint16"),
        ({"dead_code_threshold": -1}, "expected dead_code_threshold to be at least 0, got -1"),
        ({"codebook_dim": 0}, "expected codebook_dim to be an integer of at least 1, got 0"),
    ],
)
def test_options_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizerEMA(K, D, 0.25, 0.9, **options)


def test_index_dtype_without_a_sign_refuses_a_mask():
    layer = make("ema", index_dtype=torch.uint16)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="expected a signed index_dtype with a mask, for the index -1 of no code"):
        layer(torch.randn(2, D, 20), torch.ones(2, 20, dtype=torch.bool))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_index_dtype_that_is_too_small_raises():
    with pytest.raises(ValueError, match="expected index_dtype to hold 70000 codes"):
        VectorQuantizer(70000, D, 0.25, index_dtype=torch.uint16)

"""Layouts, masks and losses that vector-quantize-pytorch 1.32 lacks or computes wrongly, and that are mended here."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own

from .mends import Mends

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

mend = Mends()
SHARED = {"heads": 2}
SEPARATE = {"heads": 2, "separate_codebook_per_head": True}
IMAGE, IMAGES = {"accept_image_fmap": True}, (2, 8, 5, 3)
CHANNEL_FIRST = {"channel_last": False}
DIVERSITY = {"codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 1.0}
MASK = torch.tensor([[True] * 4 + [False] * 3, [False, True] * 3 + [False]])


def vector_quantize(package, **arguments):
    torch.manual_seed(0)
    return package.VectorQuantize(**{"dim": 8, "codebook_size": 16, **arguments})


def residual_vq(package, name="ResidualVQ", **arguments):
    torch.manual_seed(0)
    return getattr(package, name)(**{"dim": 8, "codebook_size": 16, "num_quantizers": 3, **arguments})


def data(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Decoding


@mend(
    RuntimeError,
    image={"arguments": {**IMAGE, "codebook_dim": 4}, "shape": IMAGES},
    volume={"arguments": {"accept_3d_fmap": True, "codebook_dim": 4}, "shape": (2, 8, 2, 3, 5)},
    channel_first={"arguments": {**CHANNEL_FIRST, "codebook_dim": 4}, "shape": (2, 8, 7)},
    shared_heads_projected={"arguments": SHARED, "shape": (2, 7, 8)},
    separate_heads_image={"arguments": {**IMAGE, **SEPARATE}, "shape": IMAGES},
)
@mend(
    AssertionError,
    shared_heads={"arguments": {**SHARED, "codebook_dim": 4}, "shape": (2, 7, 8)},
    shared_heads_image={"arguments": {**IMAGE, **SHARED, "codebook_dim": 4}, "shape": IMAGES},
)
def check_indices_decode_to_the_output(package, arguments, shape):
    layer = vector_quantize(package, **arguments).eval()
    quantized, indices, _ = layer(data(*shape))
    assert_close(layer.get_output_from_indices(indices), quantized)


@mend(plain={"arguments": {}, "index": [[-1, 3]]}, image={"arguments": IMAGE, "index": [[[-1, 3]]]})
def check_index_of_no_code_decodes_to_zeros(package, arguments, index):
    layer = vector_quantize(package, **arguments)
    for decode in (layer.get_output_from_indices, layer.get_codes_from_indices):
        decoded = decode(torch.tensor(index)).movedim(1 if arguments else -1, -1).reshape(2, 8)
        assert not decoded[0].any()
        assert_close(decoded[1], layer.codebook[3])


@mend(projected={"arguments": {"codebook_dim": 3}})
@mend(
    RuntimeError,
    separate={"arguments": {**SEPARATE, "codebook_dim": 4}},
    separate_projected={"arguments": {**SEPARATE, "codebook_dim": 3}},
)
def check_masked_indices_decode_to_the_output(package, arguments):
    layer = vector_quantize(package, **arguments).eval()
    quantized, indices, _ = layer(data(2, 7, 8), mask=MASK)
    assert_close(layer.get_output_from_indices(indices), quantized)


@mend(residual={"name": "ResidualVQ"}, grouped={"name": "GroupedResidualVQ"})
def check_indices_of_the_first_levels_decode(package, name):
    layer = residual_vq(package, name).eval()
    _, indices, _ = layer(data(2, 7, 8))
    dropped = indices.clone()
    dropped[..., 2] = -1
    assert_close(layer.get_output_from_indices(indices[..., :2]), layer.get_output_from_indices(dropped))


@mend(residual={"name": "ResidualVQ"}, grouped={"name": "GroupedResidualVQ"})
def check_indices_of_images_decode_to_images(package, name):
    layer = residual_vq(package, name, **IMAGE).eval()
    groups = [layer] if name == "ResidualVQ" else list(layer.rvqs)
    indices = torch.randint(0, 16, (len(groups), 2, 5, 3, 3), generator=torch.Generator().manual_seed(0))
    parts = [group.codebooks[torch.arange(3), part].sum(-2) for group, part in zip(groups, indices, strict=True)]
    expected = torch.cat(parts, -1).movedim(-1, 1)
    decoded = layer.get_output_from_indices(indices[0] if name == "ResidualVQ" else indices)
    assert_close(decoded, expected)


# Layouts of the input


def as_maps(layer, sequences, maps):
    """Train one layer on maps and an equal one on their vectors: both outputs as sequences, and the states."""
    (first, indices, losses), (second, expected, terms) = layer[0](maps), layer[1](sequences)
    assert_close(first.flatten(2).mT, second)
    assert torch.equal(indices.reshape(expected.shape), expected)
    assert_close(losses, terms)
    states = [module.state_dict() for module in layer]
    for name, value in states[0].items():
        assert_close(value, states[1][name])


@mend(
    RuntimeError,
    residual={"name": "ResidualVQ", "arguments": {}},
    projected={"name": "ResidualVQ", "arguments": {"codebook_dim": 4}},
    cosine={"name": "ResidualVQ", "arguments": {"use_cosine_sim": True}},
    shared={"name": "ResidualVQ", "arguments": {"shared_codebook": True}},
    grouped={"name": "GroupedResidualVQ", "arguments": {"groups": 2}},
)
def check_images_are_quantized_as_their_vectors(package, name, arguments):
    maps = data(*IMAGES)
    layers = [residual_vq(package, name, **layout, **arguments) for layout in (IMAGE, {})]
    as_maps(layers, maps.flatten(2).mT, maps)


@mend(
    RuntimeError,
    maps={"name": "VectorQuantize", "shape": (2, 5, 3, 8)},
    residual_maps={"name": "ResidualVQ", "shape": (2, 5, 3, 8)},
)
def check_layouts_are_quantized_as_sequences(package, name, shape):
    layers = [(vector_quantize if name == "VectorQuantize" else residual_vq)(package) for _ in range(2)]
    x = data(*shape)
    quantized, indices, _ = layers[0](x)
    expected, index, _ = layers[1](x.reshape(shape[0], -1, 8))
    assert_close(quantized, expected.reshape(shape))
    assert torch.equal(indices.flatten(), index.flatten())


# Masks


@mend(
    RuntimeError,
    projected={"arguments": {"codebook_dim": 4}},
    heads={"arguments": SHARED},
    heads_equal={"arguments": {**SHARED, "codebook_dim": 4}},
    separate_equal={"arguments": {**SEPARATE, "codebook_dim": 4}},
    projected_cosine={"arguments": {"codebook_dim": 4, "use_cosine_sim": True}},
)
@mend(cosine={"arguments": {"use_cosine_sim": True}}, separate={"arguments": SEPARATE})
def check_loss_with_a_mask_is_that_of_valid_vectors(package, arguments):
    layer, x = vector_quantize(package, **arguments), data(2, 7, 8).requires_grad_()
    before = layer.codebook.double()
    quantized, indices, loss = layer(x, mask=MASK)
    assert (indices[~MASK] == -1).all()
    assert not quantized[~MASK].any()
    heads = arguments.get("heads", 1)
    vectors = layer.double().project_in(x.double()).unflatten(-1, (heads, -1))[MASK]
    if arguments.get("use_cosine_sim"):
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    index = indices[MASK].view(-1, heads)
    codes = before[torch.arange(heads), index] if before.ndim == 3 else before[index]
    expected = mse_loss(vectors, codes)
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, x)[0] for value in (loss, expected)]
    assert not gradients[0][~MASK].any()
    assert_close(*gradients, rtol=1e-4, atol=1e-7)


@mend(residual={"name": "ResidualVQ"}, grouped={"name": "GroupedResidualVQ"})
def check_losses_of_levels_with_a_mask_are_those_of_valid_vectors(package, name):
    arguments = {"use_cosine_sim": True}
    layers = [residual_vq(package, name, **arguments) for _ in range(2)]
    x = data(1, 7, 8)
    losses = [layers[0](x, mask=MASK[:1])[2], layers[1](x[:, :4])[2]]
    assert_close(*losses)


@mend(diversity=DIVERSITY)
def check_loss_of_a_masked_sequence_is_that_of_its_valid_part(package, **arguments):
    x = data(1, 7, 8)
    losses = [
        vector_quantize(package, **arguments)(x, mask=MASK[:1])[2],
        vector_quantize(package, **arguments)(x[:, :4])[2],
    ]
    assert_close(*losses)


@mend(diversity=DIVERSITY)
@mend(cosine={"use_cosine_sim": True})
def check_masked_vectors_of_nan_reach_no_loss_or_gradient(package, **arguments):
    results = []
    for value in (0.0, torch.nan):
        layer, x = vector_quantize(package, **arguments), data(2, 7, 8)
        x[~MASK] = value
        loss = layer(x.requires_grad_(), mask=MASK)[2]
        loss.backward()
        results.append((loss, x.grad))
    assert_close(*results)


@mend(image={"arguments": IMAGE, "shape": IMAGES}, one_token={"arguments": {}, "shape": (4, 8)})
def check_mask_of_any_layout_is_taken(package, arguments, shape):
    layer = vector_quantize(package, **arguments).eval()
    mask = torch.rand((shape[0], *shape[2:]), generator=torch.Generator().manual_seed(0)) < 0.5
    quantized, indices, _ = layer(data(*shape), mask=mask)
    assert torch.equal(indices >= 0, mask)
    assert torch.equal(quantized.movedim(1, -1).any(-1) if arguments else quantized.any(-1), mask)


# Cross-entropy


@mend(
    ValueError,
    residual={"name": "ResidualVQ", "arguments": {}},
    projected={"name": "ResidualVQ", "arguments": {"codebook_dim": 4}},
    grouped={"name": "GroupedResidualVQ", "arguments": {"groups": 2}},
)
def check_cross_entropy_to_indices_is_that_of_the_distances(package, name, arguments):
    layer, x = residual_vq(package, name, **arguments).double().eval(), data(2, 7, 8).double()
    groups = [layer] if name == "ResidualVQ" else list(layer.rvqs)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 16, (len(groups), 2, 7, 3), generator=generator)
    _, loss = layer(x, indices=targets[0] if name == "ResidualVQ" else list(targets))
    expected = 0.0
    for group, part, target in zip(groups, x.chunk(len(groups), -1), targets, strict=True):
        residual = group.project_in(part)
        for level, codes in enumerate(group.codebooks.double()):
            distances = torch.cdist(residual, codes)
            chosen = distances.gather(-1, target[..., level, None])[..., 0]
            expected = expected + (chosen + (-distances).logsumexp(-1)).mean()
            residual = residual - codes[distances.argmin(-1)]
    assert_close(loss.double(), expected.detach() if hasattr(expected, "detach") else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mended", mend.found)
def test_mend_holds_here(mended):
    mended(own)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("mended", mend.found)
def test_mend_is_missing_in_the_source(mended):
    with pytest.raises(mended.error):
        mended(stock)

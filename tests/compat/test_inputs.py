"""Empty, strided, half-precision and double inputs of VectorQuantize, ResidualVQ and GroupedResidualVQ."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own

VECTOR, RESIDUAL = {"name": "VectorQuantize"}, {"name": "ResidualVQ", "num_quantizers": 3}
SEPARATE = {"heads": 2, "separate_codebook_per_head": True}
IMAGE = {"accept_image_fmap": True}
ORTHOGONAL = {"orthogonal_reg_weight": 1.0}
KINDS = {
    "plain": VECTOR,
    "projected": {**VECTOR, "codebook_dim": 4},
    "separate": {**VECTOR, **SEPARATE},
    "shared_heads": {**VECTOR, "heads": 2},
    "cosine": {**VECTOR, "use_cosine_sim": True},
    "learnable": {**VECTOR, "learnable_codebook": True, "ema_update": False},
    "orthogonal": {**VECTOR, **ORTHOGONAL},
    "orthogonal_active": {**VECTOR, **ORTHOGONAL, "orthogonal_reg_active_codes_only": True},
    "diverse": {**VECTOR, "codebook_diversity_loss_weight": 1.0},
    "sampled": {**VECTOR, "stochastic_sample_codes": True},
    "revival": {**VECTOR, "threshold_ema_dead_code": 2},
    "kmeans": {**VECTOR, "kmeans_init": True},
    "image": {**VECTOR, **IMAGE},
    "residual": RESIDUAL,
    "residual_shared": {**RESIDUAL, "shared_codebook": True},
    "residual_cosine": {**RESIDUAL, "use_cosine_sim": True},
    "residual_image": {**RESIDUAL, **IMAGE, "codebook_dim": 4},
    "residual_revival": {**RESIDUAL, "threshold_ema_dead_code": 2},
    "residual_kmeans": {**RESIDUAL, "kmeans_init": True},
    "residual_dropout": {**RESIDUAL, "quantize_dropout": True},
    "residual_sizes": {**RESIDUAL, "codebook_size": (16, 8, 4)},
    "grouped": {**RESIDUAL, "name": "GroupedResidualVQ", "groups": 2},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind):
    torch.manual_seed(0)
    arguments = {"dim": 8, "codebook_size": 16, **KINDS[kind]}
    return getattr(own, arguments.pop("name"))(**arguments)


def shape_of(kind, batch, length):
    return (batch, 8, length, 2) if "image" in kind else (batch, length, 8)


def data(kind, batch=2, length=6, seed=1):
    return torch.randn(shape_of(kind, batch, length), generator=torch.Generator().manual_seed(seed))


def train(layer, x, **options):
    """A step: the outputs and the state after it."""
    torch.manual_seed(4)
    quantized, indices, loss = layer(x, **options)
    (quantized.double().square().sum() + loss.double().sum()).backward()
    return [quantized, indices, loss, *layer.state_dict().values()]


def assert_same_codes(layer, state):
    for name, value in layer.state_dict().items():
        if name.endswith("embed"):
            assert_close(value, state[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
@every_kind
def test_empty_batches_give_empty_outputs_and_finite_losses(kind, batch, length, mode, is_masked):
    layer, x = make(kind).train(mode == "train"), data(kind, batch, length).requires_grad_()
    positions = (batch, length, 2) if "image" in kind else (batch, length)
    options = {"mask": torch.ones(positions, dtype=torch.bool)} if is_masked else {}
    before = copy.deepcopy(layer.state_dict())
    quantized, indices, loss = layer(x, **options)
    if mode == "train":
        (quantized.sum() + loss.sum()).backward()
    assert quantized.shape == layer.get_output_from_indices(indices).shape == x.shape
    assert loss.isfinite().all()
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert all(each.grad is None or each.grad.isfinite().all() for each in layer.parameters())
    assert_same_codes(layer, before)


@every_kind
def test_batch_of_masked_vectors_alone_has_finite_losses_and_moves_nothing(kind):
    layer, x = make(kind), data(kind).fill_(torch.nan).requires_grad_()
    before = copy.deepcopy(layer.state_dict())
    mask = torch.zeros((2, 6, 2) if "image" in kind else (2, 6), dtype=torch.bool)
    quantized, indices, loss = layer(x, mask=mask)
    (quantized.sum() + loss.sum()).backward()
    assert not quantized.any()
    assert (indices == -1).all()
    assert loss.isfinite().all()
    assert not x.grad.any()
    assert_same_codes(layer, before)


@every_kind
def test_strided_inputs_give_what_contiguous_ones_give(kind):
    dense = data(kind).requires_grad_()
    expected = train(make(kind), dense)
    reversed_dims = torch.empty(dense.shape[::-1]).permute(*reversed(range(dense.ndim)))
    every_second = torch.zeros(*dense.shape[:-1], 2 * dense.shape[-1])[..., ::2]
    for strided in (reversed_dims, every_second):
        x = strided.copy_(dense.detach()).requires_grad_()
        assert not x.is_contiguous()
        for value, other in zip(train(make(kind), x), expected, strict=True):
            assert_close(value, other, rtol=1e-4, atol=1e-5)
        assert_close(x.grad, dense.grad, rtol=1e-4, atol=1e-5)


@every_kind
def test_expanded_input_gets_the_sum_of_the_gradients(kind):
    one = data(kind, 1).requires_grad_()
    dense = one.detach().repeat(2, *[1] * (one.ndim - 1)).requires_grad_()
    results = [train(make(kind), x) for x in (one.expand_as(dense), dense)]
    for value, expected in zip(*results, strict=True):
        assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert_close(one.grad, dense.grad.sum(0, keepdim=True), rtol=1e-3, atol=1e-4)


@every_kind
def test_output_may_be_changed_in_place_and_input_need_be_no_leaf(kind):
    weight, layer = torch.tensor(2.0, requires_grad=True), make(kind)
    quantized, _, loss = layer(data(kind) * weight)
    quantized.mul_(2)
    (quantized.sum() + loss.sum()).backward()
    assert weight.grad.isfinite()
    with torch.no_grad():
        quantized, _, loss = layer(data(kind).requires_grad_())
    assert not quantized.requires_grad
    assert not loss.requires_grad


@every_kind
def test_layer_of_inference_mode_runs(kind):
    with torch.inference_mode():
        layer = make(kind).eval()
        quantized, indices, _ = layer(data(kind))
        assert_close(layer.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_kind
def test_half_precision_input_gives_the_indices_of_its_float32_values(kind, dtype):
    x = data(kind).to(dtype).requires_grad_()
    quantized, indices, loss, *state = train(make(kind), x)
    _, expected, term, *other = train(make(kind), x.detach().float().requires_grad_())
    assert quantized.dtype == x.grad.dtype == dtype
    assert loss.dtype == torch.float32
    assert x.grad.isfinite().all()
    assert torch.equal(indices, expected)
    assert_close(loss, term, rtol=1e-2, atol=1e-3)
    for value, each in zip(state, other, strict=True):
        assert_close(value, each, rtol=1e-2, atol=1e-3)


@every_kind
def test_half_precision_module_takes_inputs_of_any_dtype(kind):
    for dtype in (torch.bfloat16, torch.float32):
        quantized, _, loss, *_ = train(make(kind).to(torch.bfloat16), data(kind).to(dtype).requires_grad_())
        assert quantized.dtype == dtype
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("module_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_double_and_float32_mix(kind, module_dtype, dtype):
    quantized, indices, loss, *state = train(make(kind).to(module_dtype), data(kind).to(dtype).requires_grad_())
    assert quantized.dtype == dtype
    _, expected, term, *others = train(make(kind), data(kind).requires_grad_())
    wide = {torch.bool, module_dtype}
    assert all(value.dtype in wide for value in state)
    # Random numbers of another dtype are other ones.
    if kind not in ("sampled", "kmeans", "revival", "residual_kmeans", "residual_revival"):
        assert torch.equal(indices, expected)
        assert_close(loss, term, rtol=1e-4, atol=1e-5, check_dtype=False)
        for value, each in zip(state, others, strict=True):
            assert_close(value, each, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind]["name"] == "VectorQuantize"])
def test_copy_between_accumulated_steps_goes_on_alike(kind):
    layer = make(kind)
    layer(data(kind), accum_ema_update=True)
    layers = [layer, copy.deepcopy(layer)]
    results = [train(each, data(kind, seed=2).requires_grad_()) for each in layers]
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grouped"])
def test_usage_counts_the_codes_of_a_step(kind):
    layer = make(kind)
    for step in range(20):
        layer(data(kind, length=50, seed=step))
    usage = layer.usage
    num_codes = torch.as_tensor(KINDS[kind].get("codebook_size", 16))
    assert (usage.perplexity > 1).all()
    assert (usage.perplexity <= num_codes * 1.0001).all()

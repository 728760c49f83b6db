from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dlvae_kernels import GroupedResidualVectorQuantizer, ResidualVectorQuantizer

L, K, D = 4, 16, 6


def make(**options) -> ResidualVectorQuantizer:
    return ResidualVectorQuantizer(L, K, D, **{"init": "normal", **options})


def batch(size: int = 8, length: int = 20) -> Tensor:
    return torch.randn(size, D, length)


def ema_step_by_formula(x: Tensor, state: dict[str, Tensor], decay: float, epsilon: float) -> Tensor:
    """Quantize vectors [N, D] and update codebooks in float64, level by level; returns the sum of the codes."""
    residual, quantized = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    codes, sizes, sums = (state[f"codebook.{name}"] for name in ("codes", "cluster_size", "embed_sum"))
    for level in range(len(codes)):
        index = torch.cdist(residual, codes[level]).argmin(1)
        one_hot = torch.nn.functional.one_hot(index, codes.shape[1]).double()
        found = codes[level][index].clone()
        count = one_hot.sum(0)
        sizes[level] = decay * sizes[level] + (1 - decay) * count
        sums[level] = decay * sums[level] + (1 - decay) * one_hot.T @ residual
        smoothed = (sizes[level] + epsilon) / (sizes[level].sum() + len(count) * epsilon) * sizes[level].sum()
        updated = sums[level] / smoothed[:, None]
        codes[level] = torch.where(count[:, None] > 0, updated, codes[level])
        residual = residual - found
        quantized += found
    return quantized


def test_residual_quantizer_ema_steps_equal_the_formula():
    layer = make(decay=0.8, epsilon=1e-3, dead_code_threshold=0)
    state = {name: value.double() for name, value in layer.state_dict().items()}
    for _ in range(5):
        x = batch()
        expected = ema_step_by_formula(x.movedim(1, -1).reshape(-1, D), state, 0.8, 1e-3)
        out = layer(x)
        torch.testing.assert_close(out.quantized.movedim(1, -1).reshape(-1, D).double(), expected, rtol=1e-4, atol=1e-5)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value.double(), state[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("gradient", "factor"), [("once", 1), ("each", L)])
def test_residual_quantizer_straight_through_gradient(gradient, factor):
    layer, x = make(gradient=gradient, commitment_cost=0.0), batch().requires_grad_()
    weights = torch.randn(x.shape)
    (layer(x).quantized * weights).sum().backward()
    torch.testing.assert_close(x.grad, factor * weights)


def test_residual_quantizer_learns_by_gradient():
    layer, x = make(decay=None), batch()
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    first = layer(x).loss
    for _ in range(20):
        optimizer.zero_grad()
        layer(x).loss.backward()
        optimizer.step()
    assert layer(x).loss < 0.9 * first
    assert {name for name, _ in layer.named_parameters()} == {"codebook.codes"}


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 3}, {"channel_last": True}])
def test_residual_quantizer_decodes_what_it_encodes(options):
    layer = make(**options).eval()
    x = batch() if not options.get("channel_last") else batch().movedim(1, -1)
    out = layer(x)
    assert out.indices.shape == (8, 20, L)
    torch.testing.assert_close(layer.decode(out.indices), out.quantized)
    assert torch.equal(layer.encode(x), out.indices)
    assert torch.equal(layer.encode(x, num_levels=2), out.indices[..., :2])
    torch.testing.assert_close(layer.decode(out.indices[..., :2]), layer(x, num_levels=2).quantized)
    assert torch.equal(layer(x, num_levels=2).indices[..., 2:], torch.full((8, 20, 2), -1))


def test_residual_quantizer_each_level_lowers_the_error():
    layer = ResidualVectorQuantizer(L, K, D)
    for _ in range(30):
        layer(batch(32))
    layer.eval()
    x = batch(32)
    errors = [float((layer.decode(layer.encode(x, num_levels=n)) - x).square().mean()) for n in range(1, L + 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_residual_quantizer_kmeans_initialises_every_level_from_its_residuals():
    layer = ResidualVectorQuantizer(L, K, D, init="kmeans", dead_code_threshold=0)
    assert not layer.codebooks.any()
    layer.eval()(batch())
    assert not layer.codebooks.any()
    layer.train()(batch(32))
    norms = layer.codebooks.norm(dim=-1).mean(-1)
    assert torch.equal(norms.argsort(descending=True), torch.arange(L))
    assert len(layer.codebooks.flatten(0, 1).unique(dim=0)) == L * K


def test_quantizer_dropout_runs_a_prefix_and_keeps_the_state_of_the_others():
    layer = make(quantizer_dropout=True, min_levels=2)
    seen = set()
    for _ in range(40):
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        indices = layer(batch()).indices
        ran = (indices >= 0).flatten(0, -2).all(0)
        count = int(ran.sum())
        seen.add(count)
        assert torch.equal(ran, torch.arange(L) < count)
        assert (indices[..., count:] == -1).all()
        for name, value in layer.state_dict().items():
            assert torch.equal(value[count:], before[name][count:]), name
            assert not torch.equal(value[:count], before[name][:count]), name
    assert seen == {2, 3, 4}
    assert (layer.eval()(batch()).indices >= 0).all()


@pytest.mark.parametrize("options", [{"quantizer_dropout": True}, {}])
def test_residual_quantizer_by_gradient_without_all_levels_trains(options):
    layer, x = make(decay=None, dead_code_threshold=0, **options), batch().requires_grad_()
    layer(x, num_levels=None if options else 2).loss.backward()
    assert x.grad.isfinite().all()


def test_residual_quantizer_revives_no_code_of_a_level_that_did_not_run():
    layer = make(dead_code_threshold=1000.0)
    before = layer.codebooks.clone()
    layer(batch(), num_levels=1)
    assert torch.equal(layer.codebooks[1:], before[1:])
    assert int(layer.usage.revived) == K


def test_residual_quantizer_masked_nan_reaches_no_gradient():
    layer, x, mask = make(codebook_dim=3), batch(2, 30), torch.rand(2, 30) < 0.6
    x.movedim(1, -1)[~mask] = torch.nan
    x.requires_grad_()
    out = layer(x, mask)
    assert not out.quantized.movedim(1, -1)[~mask].any()
    (out.loss + out.quantized.square().sum()).backward()
    assert all(value.grad.isfinite().all() for value in (x, *layer.project_in.parameters()))


@pytest.mark.parametrize("decay", [0.9, None])
def test_residual_quantizer_masked_positions_are_as_if_absent(decay):
    layer = make(decay=decay, dead_code_threshold=0)
    like = copy.deepcopy(layer)
    x, mask = batch(1, 30), torch.rand(1, 30) < 0.6
    y = x.clone()
    y[:, :, ~mask[0]] = torch.nan
    out, expected = layer(y, mask), like(x[:, :, mask[0]])
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.quantized[:, :, mask[0]], expected.quantized)
    assert not out.quantized[:, :, ~mask[0]].any()
    assert torch.equal(out.indices[mask], expected.indices[0])
    assert (out.indices[~mask] == -1).all()
    torch.testing.assert_close(out.perplexity, expected.perplexity)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, like.state_dict()[name], msg=name)


@pytest.mark.parametrize("options", [{}, {"decay": None}, {"quantizer_dropout": True}])
def test_residual_quantizer_compiles_without_breaks(options):
    layer = make(**options)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = batch().requires_grad_()
        y = x.detach().clone().requires_grad_()
        for function, inputs in ((compiled, x), (twin, y)):
            torch.manual_seed(3)
            out = function(inputs)
            (out.loss + out.quantized.square().sum()).backward()
        torch.testing.assert_close(x.grad, y.grad)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, msg=name)


def test_residual_quantizer_statistics_stay_float32():
    layer = make(codebook_dim=3).to(torch.bfloat16)
    assert layer.project_in.weight.dtype == torch.bfloat16
    assert {value.dtype for name, value in layer.state_dict().items() if "codebook" in name} == {torch.float32}
    assert layer(batch().bfloat16()).quantized.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("init", ["normal", "kmeans"])
def test_residual_quantizer_activation_checkpointing_updates_once(reentrant, init):
    layer = make(init=init)
    twin, x = copy.deepcopy(layer), batch(32).requires_grad_()
    torch.manual_seed(1)
    out = checkpoint(lambda z: layer(z)[:2], x, use_reentrant=reentrant)
    (out[0] + out[1].sum()).backward()
    after = torch.rand(3)
    torch.manual_seed(1)
    twin(x.detach())
    assert torch.equal(after, torch.rand(3))
    for name, value in twin.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name]), name


def test_residual_quantizer_state_dict_keys():
    assert list(make(codebook_dim=2).state_dict()) == [
        *("project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias"),
        *("codebook.codes", "codebook.cluster_size", "codebook.embed_sum"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_levels": 5}, r"expected num_levels to be an integer in \[1, 4\], got 5"),
        ({"mask": torch.ones(8, 19, dtype=torch.bool)}, r"expected mask of dtype torch.bool and shape \(8, 20\)"),
        ({"mask": torch.ones(8, 20)}, r"expected mask of dtype torch.bool .* got torch.float32"),
    ],
)
def test_residual_quantizer_bad_inputs_raise(arguments, message):
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer(batch(), **arguments)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_residual_quantizer_unsigned_indices_cannot_miss_a_level():
    layer = make(index_dtype=torch.uint16)
    assert layer(batch()).indices.dtype == torch.uint16
    assert layer.decode(layer.encode(batch())).shape == (8, D, 20)
    with pytest.raises(
        ValueError, match="expected a signed index_dtype with a mask or without all levels, for the index -1"
    ):
        layer(batch(), num_levels=2)
    assert layer(batch(), num_levels=L).indices.dtype == torch.uint16
    with pytest.raises(ValueError, match=r"with quantizer dropout, .* got torch.uint16; pass torch.int32"):
        make(index_dtype=torch.uint16, quantizer_dropout=True)


@pytest.mark.parametrize("channel_last", [False, True])
def test_grouped_residual_quantizer_is_one_quantizer_a_group(channel_last):
    layer = GroupedResidualVectorQuantizer(2, L, K, D, init="normal", channel_last=channel_last)
    groups = copy.deepcopy(layer.groups)
    x = batch().movedim(1, -1) if channel_last else batch()
    parts = x.chunk(2, -1 if channel_last else 1)
    outs = []
    for group, part in zip(groups, parts, strict=True):
        outs.append(group(part))
    torch.manual_seed(0)
    out = layer(x)
    torch.testing.assert_close(out.loss, sum(each.loss for each in outs) / 2)
    assert torch.equal(out.indices, torch.stack([each.indices for each in outs], dim=-2))
    assert out.indices.shape == (8, 20, 2, L)
    layer.eval()
    torch.testing.assert_close(layer.decode(layer.encode(x)), layer(x).quantized)
    assert layer.encode(x, num_levels=1).shape == (8, 20, 2, 1)


def test_grouped_residual_quantizer_drops_the_same_levels_in_all_groups():
    layer = GroupedResidualVectorQuantizer(2, L, K, D, init="normal", quantizer_dropout=True)
    for _ in range(10):
        ran = layer(batch()).indices >= 0
        assert torch.equal(ran[..., 0, :], ran[..., 1, :])
    assert layer.codebooks.shape == (2, L, K, D // 2)
    assert layer.usage.perplexity.shape == (2, L)


def test_grouped_residual_quantizer_bad_inputs_raise():
    with pytest.raises(ValueError, match="expected embedding_dim to be a multiple of num_groups, got 6 and 4"):
        GroupedResidualVectorQuantizer(4, L, K, D)
    layer = GroupedResidualVectorQuantizer(2, L, K, D)
    with pytest.raises(ValueError, match=r"expected inputs of shape \[B, 6, ...\], got \(2, 5, 20\)"):
        layer(torch.randn(2, 5, 20))
    with pytest.raises(ValueError, match=r"expected indices of shape \[B, \*spatial, 2, n\], got \(2, 5\)"):
        layer.decode(torch.zeros(2, 5, dtype=torch.int64))

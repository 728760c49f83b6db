from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dlvae_kernels import LookupFreeQuantizer


def formula(layer: LookupFreeQuantizer, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Codes and losses of vectors [N, d] in float64, with the distribution over all codes."""
    arguments = layer._arguments()
    scale, weight = arguments["codebook_scale"], arguments["commitment_loss_weight"]
    x = x.double()
    d = x.shape[1]
    codes = ((torch.arange(2**d)[:, None] >> torch.arange(d - 1, -1, -1)) & 1) * 2.0 - 1
    codes = codes.double() * scale
    if arguments["spherical"]:
        x, codes = normalize(x, dim=1) * scale, normalize(codes, dim=1) * scale
    if mask is not None:
        x = x[mask]
    indices = ((x > 0).long() << torch.arange(d - 1, -1, -1)).sum(1)
    log_p = (2 * arguments["inv_temperature"] * x @ codes.T).log_softmax(1)
    per_sample = -(log_p.exp() * log_p).sum(1).mean()
    mean = log_p.exp().mean(0)
    batch = -torch.special.xlogy(mean, mean.clamp(min=1e-300)).sum()
    commitment = (x - codes[indices]).square().mean()
    entropy = per_sample - arguments["diversity_gamma"] * batch
    return {
        "indices": indices,
        "quantized": codes[indices] + (x - x.detach()),
        "loss": arguments["entropy_loss_weight"] * entropy + weight * commitment,
        "per_sample_entropy": per_sample,
        "batch_entropy": batch,
        "commitment_loss": commitment,
    }


@pytest.mark.small
def test_lfq_signs_by_hand():
    layer = LookupFreeQuantizer(8, codebook_scale=2.0, channel_last=True)
    out = layer(torch.tensor([[0.5, -3.0, 1.0], [0.0, -0.1, 7.0]]))
    assert out.quantized.tolist() == [[2, -2, 2], [-2, -2, 2]]
    assert out.indices.tolist() == [0b101, 0b001]
    assert out.indices.dtype == torch.int64
    assert float(out.commitment_loss) == pytest.approx((2.25 + 1 + 1 + 4 + 3.61 + 25) / 6)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"inv_temperature": 1.0, "diversity_gamma": 2.5},
        {"codebook_scale": 0.25, "inv_temperature": 3.0, "commitment_loss_weight": 0.0},
        {"spherical": True, "inv_temperature": 5.0, "codebook_scale": 1.5},
        {"entropy_loss_weight": 0.7, "inv_temperature": 0.1},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_lfq_values_and_gradients_match_float64(arguments, masked):
    layer = LookupFreeQuantizer(2**7, channel_last=True, **arguments)
    x = (0.3 * torch.randn(40, 7)).requires_grad_()
    mask = torch.rand(40) < 0.6 if masked else None
    found, expected = layer(x, mask)._asdict(), formula(layer, x, mask)
    if mask is not None:
        assert (found["indices"][~mask] == -1).all()
        assert not found["quantized"][~mask].any()
        found["indices"], found["quantized"] = found["indices"][mask], found["quantized"][mask]
    assert torch.equal(found.pop("indices"), expected.pop("indices"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)
        of = found[name].square().sum(), value.square().sum()
        grads = [torch.autograd.grad(each, x, retain_graph=True)[0] for each in of]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=3e-4 * float(grads[1].abs().max()), msg=name)


@pytest.mark.parametrize(
    "arguments",
    [{"codebook_size": 32}, {"codebook_size": 16, "dim": 7, "num_codebooks": 2}, {"dim": 5, "spherical": True}],
)
def test_lfq_equals_vector_quantize_pytorch(arguments):
    module = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")
    like = module.LFQ(**arguments, commitment_loss_weight=0.25)
    layer = LookupFreeQuantizer(**arguments)
    layer.load_state_dict({name: value for name, value in like.state_dict().items() if name != "mask"})
    x = (0.05 * torch.randn(2, layer.dim, 6, 5)).requires_grad_()
    (quantized, indices, loss), terms = like(x, return_loss_breakdown=True)
    out = layer(x)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, quantized)
    torch.testing.assert_close(layer.decode(indices), like.indices_to_codes(indices))
    # The baseline takes logarithms of no less than 1e-5.
    for actual, expected in zip(out[2:], (loss, *terms), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    grads = [torch.autograd.grad(each, x)[0] for each in (out.loss, loss)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * float(grads[1].abs().max()))


def test_lfq_maps_of_both_layouts_agree():
    first = LookupFreeQuantizer(16, 6, num_codebooks=2)
    last = LookupFreeQuantizer(16, 6, num_codebooks=2, channel_last=True)
    last.load_state_dict(first.state_dict())
    for spatial in ((), (7,), (3, 4)):
        x, mask = torch.randn(2, 6, *spatial), torch.rand(2, *spatial) < 0.7
        out, moved = first(x, mask), last(x.movedim(1, -1), mask)
        assert out.quantized.shape == x.shape
        assert out.indices.shape == (2, *spatial, 2)
        assert torch.equal(first.encode(x)[mask], out.indices[mask])
        assert torch.equal(moved.indices, out.indices)
        torch.testing.assert_close(moved.quantized.movedim(-1, 1), out.quantized)
        torch.testing.assert_close(moved.loss, out.loss)
        # Masked positions decode to the zeros that the forward pass gives them.
        torch.testing.assert_close(first.decode(out.indices), out.quantized)


def test_lfq_masked_nan_changes_nothing():
    layer = LookupFreeQuantizer(16, 6, channel_last=True)
    x, mask = torch.randn(5, 6), torch.tensor([True, True, False, True, False])
    bad = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    results = []
    for inputs in (x.clone().requires_grad_(), bad):
        out = layer(inputs, mask)
        grads = torch.autograd.grad(out.loss + out.quantized.square().sum(), [inputs, *layer.parameters()])
        results.append((*out, *grads))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_lfq_values_that_are_not_finite_show():
    layer = LookupFreeQuantizer(4, channel_last=True)
    out = layer(torch.tensor([[torch.nan, 1.0], [torch.inf, -1.0]]))
    assert out.indices.tolist() == [0b01, 0b10]
    assert out.quantized.isnan().tolist() == [[True, False], [True, False]]
    assert not out.loss.isfinite()


def test_lfq_without_entropy_loss_has_as_many_bits_as_an_int64():
    layer = LookupFreeQuantizer(dim=63, entropy_loss_weight=0, channel_last=True)
    x = torch.randn(4, 63)
    out = layer(x)
    assert (out.per_sample_entropy, out.batch_entropy) == (0, 0)
    assert torch.equal(layer.decode(out.indices), out.quantized)
    assert torch.equal(out.quantized, torch.where(x > 0, 1.0, -1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lfq_half_precision_and_autocast_compute_in_float32(dtype):
    layer = LookupFreeQuantizer(64, 6)
    x = (0.1 * torch.randn(4, 6, 10)).to(dtype).requires_grad_()
    expected = layer(x.float())
    with torch.autocast("cpu", dtype):
        out = layer(x)
    assert out.quantized.dtype == dtype
    for actual, value in zip(out[1:], expected[1:], strict=True):
        assert torch.equal(actual, value)
    (out.loss + out.quantized.float().sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_lfq_compiled_whole_and_exported_match_eager(training):
    layer = LookupFreeQuantizer(32, 6, num_codebooks=2, inv_temperature=3.0).train(training)
    mask = torch.rand(2, 5) < 0.7
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (torch.randn(2, 6, 5), mask)).module()
    x = torch.randn(2, 6, 5, requires_grad=True)
    results = []
    for function in (layer, compiled, exported):
        out = function(x, mask)
        results.append((*out, torch.autograd.grad(out[2] + out[0].square().sum(), x)[0]))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected)


def test_lfq_repeated_runs_are_bitwise_equal():
    layer = LookupFreeQuantizer(256, 6, inv_temperature=2.0)
    x = torch.randn(2, 6, 50, requires_grad=True)
    runs = []
    for _ in range(2):
        out = layer(x)
        runs.append((*out, *torch.autograd.grad(out.loss + out.quantized.square().sum(), [x, *layer.parameters()])))
    assert all(map(torch.equal, *runs))


def test_lfq_training_by_the_entropy_loss_activates_all_codes():
    layer = LookupFreeQuantizer(16, inv_temperature=1.0, entropy_loss_weight=1.0, channel_last=True)
    encoder = nn.Linear(8, 4)
    with torch.no_grad():
        encoder.bias.fill_(1.5)
    x = torch.randn(512, 8)
    optimizer = torch.optim.Adam(encoder.parameters(), 0.05)
    before = len(layer.encode(encoder(x)).unique())
    for _ in range(100):
        optimizer.zero_grad()
        layer(encoder(x)).loss.backward()
        optimizer.step()
    out = layer(encoder(x))
    assert before < len(out.indices.unique()) == 16
    assert float(out.batch_entropy) > 0.95 * 4 * 0.6931


def test_lfq_empty_batch_gives_empty_outputs():
    layer = LookupFreeQuantizer(16, 6)
    out = layer(torch.empty(0, 6, 3, requires_grad=True))
    assert [tuple(each.shape) for each in out] == [(0, 6, 3), (0, 3), (), (), (), ()]
    assert float(out.loss.detach()) == 0
    out.loss.backward()
    assert not any(parameter.grad.any() for parameter in layer.parameters() if parameter.grad is not None)


def test_lfq_repr_shows_every_argument():
    assert repr(LookupFreeQuantizer(dim=4)) == (
        "LookupFreeQuantizer(\n  codebook_size=16, dim=4, num_codebooks=1, entropy_loss_weight=0.1,"
        " commitment_loss_weight=0.25, diversity_gamma=1.0, inv_temperature=100.0, codebook_scale=1.0,"
        " spherical=False, projection_bias=True, sync=True, channel_last=False\n"
        "  (project_in): Identity()\n  (project_out): Identity()\n)"
    )


def test_lfq_export_in_train_mode_while_ranks_all_reduce_raises(monkeypatch):
    monkeypatch.setattr("dlvae_kernels.layers.distributed.num_ranks", lambda sync: 2 if sync else 1)
    with pytest.raises(ValueError, match="cannot be exported in train mode while ranks all-reduce"):
        torch.export.export(LookupFreeQuantizer(16), (torch.randn(2, 4),), strict=False)
    torch.export.export(LookupFreeQuantizer(16).eval(), (torch.randn(2, 4),), strict=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"expected codebook_size or dim, got neither"),
        ({"codebook_size": 24}, r"expected codebook_size to be a power of 2, got 24; pass 32"),
        ({"codebook_size": 1}, r"expected codebook_size to be an integer of at least 2, got 1"),
        ({"dim": 5, "num_codebooks": 2}, r"expected dim to be a multiple of num_codebooks=2, got 5"),
        ({"dim": 64, "entropy_loss_weight": 0}, r"expected a codebook of at most 63 bits, got 64"),
        ({"dim": 25}, r"expected at most 24 bits with an entropy loss, got 25"),
        ({"dim": 4, "entropy_loss_weight": -1}, r"expected entropy_loss_weight to be at least 0, got -1"),
        ({"dim": 4, "inv_temperature": 0}, r"expected inv_temperature to be above 0, got 0"),
        ({"dim": 4, "codebook_scale": float("nan")}, r"expected codebook_scale to be above 0, got nan"),
    ],
)
def test_lfq_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        LookupFreeQuantizer(**arguments)


@pytest.mark.parametrize(
    ("inputs", "mask", "message"),
    [
        (
            torch.zeros(2, 7, 4),
            None,
            r"expected inputs of shape .*; for channels-last inputs .* pass channel_last=True",
        ),
        (torch.zeros(2, 4).int(), None, r"expected inputs of dtype .*, got torch.int32"),
        (torch.zeros(2, 4, 3), torch.ones(2, 4).bool(), r"expected mask of shape \(2, 3\) .*, got \(2, 4\)"),
    ],
)
def test_lfq_bad_inputs_raise(inputs, mask, message):
    with pytest.raises(ValueError, match=message):
        LookupFreeQuantizer(16)(inputs, mask)

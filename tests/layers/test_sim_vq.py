from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from dlvae_kernels import SimVQ
from dlvae_kernels.testing import assert_same_codes

DIM, CODES = 6, 20


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, DIM, 5, 4, requires_grad=True)


def vectors_of(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


@pytest.mark.small
def test_sim_vq_two_codes_by_hand():
    layer = SimVQ(2, 2, 0.5)
    layer.load_state_dict(
        {
            "frozen_codebook": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
            "code_transform.weight": torch.tensor([[4.0, 0.0], [0.0, 2.0]]),
        }
    )
    out = layer(torch.tensor([[3.0, 0.0], [1.0, 2.0], [1.0, 1.0]]))
    assert layer.codebook.tolist() == [[4, 0], [0, 2]]
    assert out.indices.tolist() == [0, 1, 1]
    assert out.quantized.tolist() == [[4, 0], [0, 2], [0, 2]]
    assert float(out.loss.detach()) == pytest.approx(1.5 * (1 + 1 + 2) / 6)
    assert float(out.perplexity) == pytest.approx(3 / 2 ** (2 / 3))


@pytest.mark.parametrize("frozen_dim", [None, 3])
def test_sim_vq_loss_and_gradients_match_float64(x, frozen_dim):
    layer = SimVQ(DIM, CODES, 0.3, frozen_dim=frozen_dim)
    loss, quantized, _, indices = layer(x)
    assert_same_codes(indices, x.movedim(1, -1), layer.codebook)
    grads = torch.autograd.grad(loss + quantized.square().sum(), [x, layer.code_transform.weight])

    exact, weight = x.detach().double().requires_grad_(), layer.code_transform.weight.detach().double().requires_grad_()
    codes = (layer.frozen_codebook.double() @ weight.T)[indices].movedim(-1, 1)
    expected = mse_loss(codes, exact.detach()) + 0.3 * mse_loss(codes.detach(), exact)
    straight = exact + (codes - exact).detach()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quantized.double(), straight, rtol=1e-5, atol=1e-6)
    exact_grads = torch.autograd.grad(expected + straight.square().sum(), [exact, weight])
    for actual, value in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("frozen_dim", [None, 3])
def test_sim_vq_equals_vector_quantize_pytorch(gradient, frozen_dim):
    module = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")
    options = {"channel_first": True, "rotation_trick": gradient == "rotation", "frozen_codebook_dim": frozen_dim}
    like = module.SimVQ(DIM, CODES, **options)
    layer = SimVQ(DIM, CODES, frozen_dim=frozen_dim, gradient=gradient)
    layer.load_state_dict(like.state_dict())
    results = []
    for function in (lambda x: like(x), lambda x: [layer(x)[i] for i in (1, 3, 0)]):
        x = torch.randn(2, DIM, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
        quantized, indices, loss = function(x)
        owner = like if not results else layer
        grads = torch.autograd.grad(loss + quantized.square().sum(), [x, *owner.parameters()])
        results.append((quantized, indices, loss, *grads))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.decode(results[1][1]), like.indices_to_codes(results[0][1]))


def test_sim_vq_training_moves_every_code_and_leaves_the_frozen_vectors(x):
    layer = SimVQ(DIM, 500)
    before, frozen = layer.codebook.detach().clone(), layer.frozen_codebook.clone()
    out = layer(x)
    assert len(out.indices.unique()) < 50
    out.loss.backward()
    torch.optim.SGD(layer.parameters(), 1.0).step()
    assert (layer.codebook != before).any(1).all()
    assert torch.equal(layer.frozen_codebook, frozen)
    assert [name for name, _ in layer.named_parameters()] == ["code_transform.weight"]


def test_sim_vq_decode_of_encode_is_quantized(x):
    layer, last = SimVQ(DIM, CODES), SimVQ(DIM, CODES, channel_last=True)
    last.load_state_dict(layer.state_dict())
    out = layer(x)
    assert torch.equal(layer.encode(x), out.indices)
    assert torch.equal(layer.decode(out.indices), out.quantized)
    assert layer.decode(torch.tensor([[-1, 3]]))[0].T.equal(torch.stack([torch.zeros(DIM), layer.codebook[3]]))
    with pytest.raises(ValueError, match=r"expected indices in \[-1, 20\).*, got 20"):
        layer.decode(torch.tensor([20]))
    moved = last(x.movedim(1, -1))
    assert torch.equal(moved.indices, out.indices)
    assert torch.equal(last.decode(moved.indices), moved.quantized)
    assert layer(torch.randn(3, DIM)).indices.shape == (3,)


def test_sim_vq_takes_another_transform(x):
    layer = SimVQ(DIM, CODES, frozen_dim=3, transform=nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, DIM)))
    out = layer(x)
    out.loss.backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())
    assert layer.decode(out.indices).equal(out.quantized)
    wrong = SimVQ(DIM, CODES, transform=nn.Linear(DIM, 5))
    with pytest.raises(ValueError, match=r"expected transform to map \[K, 6\] to codes .* \(20, 6\), got \(20, 5\)"):
        wrong(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sim_vq_half_precision_and_autocast_compute_in_float32(x, dtype):
    layer = SimVQ(DIM, CODES)
    half = x.detach().to(dtype)
    expected = layer(half.float())
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype)):
        with context:
            out = layer(half)
        assert out.quantized.dtype == dtype
        assert out.loss.dtype == torch.float32
        assert torch.equal(out.indices, expected.indices)
        torch.testing.assert_close(out.loss, expected.loss)
    whole = copy.deepcopy(layer).to(dtype)
    assert whole(half).quantized.dtype == dtype


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("training", [True, False])
def test_sim_vq_compiled_whole_and_exported_match_eager(x, gradient, training):
    layer = SimVQ(DIM, CODES, gradient=gradient).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    # A graph has the gradients that its example inputs require.
    exported = torch.export.export(layer, (torch.randn(2, DIM, 5, 4, requires_grad=True),)).module()
    results = []
    for function in (layer, compiled, exported):
        loss, quantized, perplexity, indices = function(x)
        (grad,) = torch.autograd.grad(loss + quantized.square().sum(), x)
        results.append((loss, quantized, perplexity, indices, grad))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_sim_vq_repeated_runs_are_bitwise_equal(x, gradient):
    layer = SimVQ(DIM, CODES, gradient=gradient)
    runs = []
    for _ in range(2):
        out = layer(x)
        runs.append((*out, *torch.autograd.grad(out.loss + out.quantized.square().sum(), [x, *layer.parameters()])))
    assert all(map(torch.equal, *runs))


def test_sim_vq_to_empty_and_reset_parameters_initialise_anew(x):
    with torch.device("meta"):
        layer = nn.Sequential(SimVQ(DIM, 2000, frozen_dim=4))
    layer.to_empty(device="cpu")
    for value in layer.state_dict().values():
        value.fill_(torch.nan)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert float(layer[0].frozen_codebook.std()) == pytest.approx(0.5, rel=0.05)
    assert layer(x)[0].isfinite()


def test_sim_vq_empty_batch_gives_empty_outputs():
    out = SimVQ(DIM, CODES)(torch.empty(0, DIM, 3, requires_grad=True))
    assert [tuple(each.shape) for each in out] == [(), (0, DIM, 3), (), (0, 3)]
    assert (float(out.loss.detach()), float(out.perplexity)) == (0, 1)


def test_sim_vq_repr_shows_every_argument():
    assert repr(SimVQ(DIM, CODES)).splitlines()[1:3] == [
        "  dim=6, codebook_size=20, commitment_cost=0.25, frozen_dim=6, gradient='straight_through',"
        " channel_last=False",
        "  (code_transform): Linear(in_features=6, out_features=6, bias=False)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, r"expected dim to be an integer of at least 1, got 0"),
        ({"codebook_size": 0}, r"expected codebook_size to be an integer of at least 1, got 0"),
        ({"frozen_dim": 0}, r"expected frozen_dim to be an integer of at least 1, got 0"),
        ({"commitment_cost": -1}, r"expected commitment_cost to be at least 0, got -1"),
        ({"gradient": "x"}, r"expected gradient to be one of 'straight_through', 'rotation', got 'x'"),
    ],
)
def test_sim_vq_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimVQ(**({"dim": DIM, "codebook_size": CODES} | arguments))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 7, DIM), r"expected inputs of shape .*; for channels-last inputs .* pass channel_last=True"),
        (torch.zeros(2, DIM).double(), r"expected inputs of the layer's dtype, torch.float32, .*, got torch.float64"),
        (torch.zeros(2, DIM, device="meta"), r"expected inputs on the device of codebook, cpu, got meta"),
    ],
)
def test_sim_vq_bad_inputs_raise(bad, message):
    with pytest.raises(ValueError, match=message):
        SimVQ(DIM, CODES)(bad)

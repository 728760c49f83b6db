from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import mse_loss

from dlvae_kernels import SparseAutoencoder
from dlvae_kernels.testing import assert_same_topk

DIM, ATOMS, SELECTED = 6, 40, 5


@pytest.fixture
def layer():
    layer = SparseAutoencoder(DIM, ATOMS, SELECTED)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.fixture
def x():
    return torch.randn(3, 20, DIM, requires_grad=True)


def dense(layer, x):
    """The formula with all latents."""
    active = (layer.encoder(x - layer.b_dec)).relu()
    values, indices = active.topk(SELECTED)
    return torch.zeros_like(active).scatter(-1, indices, values) @ layer.W_dec + layer.b_dec, values, indices


@pytest.mark.small
def test_sparse_autoencoder_three_latents_by_hand():
    layer = SparseAutoencoder(2, 3, 2)
    layer.load_state_dict(
        {
            "encoder.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
            "encoder.bias": torch.tensor([0.5, 0.0, -1.0]),
            "W_dec": torch.tensor([[1.0, 0.0], [0.0, 1.0], [10.0, 20.0]]),
            "b_dec": torch.tensor([1.0, -1.0]),
        }
    )
    # Less b_dec: [2, 1] and [-3, -1]; latents [2.5, 1, 2] and [-2.5, -1, -5].
    out = layer(torch.tensor([[3.0, 0.0], [-2.0, -2.0]]))
    assert out.indices.tolist() == [[0, 2], [1, 0]]
    assert out.values.tolist() == [[2.5, 2.0], [0.0, 0.0]]
    assert out.reconstruction.tolist() == [[23.5, 39.0], [1.0, -1.0]]


def test_sparse_autoencoder_initial_state_is_tied_unit_vectors():
    layer = SparseAutoencoder(DIM, ATOMS, SELECTED)
    assert torch.equal(layer.encoder.weight, layer.W_dec)
    torch.testing.assert_close(layer.W_dec.norm(dim=1), torch.ones(ATOMS))
    assert not layer.encoder.bias.any()
    assert not layer.b_dec.any()


def test_sparse_autoencoder_equals_the_dense_formula(layer, x):
    twin, results = copy.deepcopy(layer), []
    for function, owner in ((layer, layer), (lambda x: dense(twin, x), twin)):
        inputs = x.detach().clone().requires_grad_()
        reconstruction, values, indices = function(inputs)
        loss = mse_loss(reconstruction, inputs) + 0.1 * values.sin().sum()
        loss.backward()
        results.append((loss, reconstruction, values, inputs.grad, *(each.grad for each in owner.parameters())))
        assert_same_topk(
            indices,
            values.detach(),
            (x - layer.b_dec).detach(),
            layer.encoder.weight.detach(),
            metric="dot",
            bias=layer.encoder.bias.detach(),
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_sparse_autoencoder_inactive_latents_have_no_gradient(layer, x):
    with torch.no_grad():
        layer.encoder.bias.fill_(-100)
    out = layer(x)
    assert not out.values.any()
    assert torch.equal(out.reconstruction, layer.b_dec.expand_as(x))
    grads = torch.autograd.grad(out.reconstruction.sum(), [x, *layer.parameters()])
    assert [bool(grad.any()) for grad in grads] == [False, False, True, False, False]


def test_sparse_autoencoder_decode_of_encode_is_the_forward(layer, x):
    values, indices = layer.encode(x)
    out = layer(x)
    assert torch.equal(values, out.values)
    assert torch.equal(indices, out.indices)
    assert torch.equal(layer.decode(values, indices), out.reconstruction)
    with pytest.raises(ValueError, match=r"expected indices in \[0, 40\), got 40"):
        layer.decode(torch.ones(1, 1), torch.tensor([[40]]))


def test_sparse_autoencoder_any_strides_match_contiguous(layer):
    x = torch.randn(2, DIM, 3, 4).permute(0, 2, 3, 1)
    for actual, expected in zip(layer(x), layer(x.contiguous()), strict=True):
        torch.testing.assert_close(actual, expected)


def test_sparse_autoencoder_normalize_decoder_scales_in_place(layer):
    with torch.no_grad():
        layer.W_dec[3] = 0
    before, weight = layer.W_dec.detach().clone(), layer.W_dec
    layer.normalize_decoder()
    assert layer.W_dec is weight
    assert weight.requires_grad
    torch.testing.assert_close(weight.detach(), torch.nn.functional.normalize(before, dim=1))


def test_sparse_autoencoder_training_reduces_the_loss():
    layer = SparseAutoencoder(8, 32, 3)
    atoms = torch.nn.functional.normalize(torch.randn(16, 8), dim=1)
    x = torch.zeros(512, 16).scatter(1, torch.rand(512, 16).topk(3).indices, 1 + torch.rand(512, 3)) @ atoms
    optimizer, losses = torch.optim.Adam(layer.parameters(), 1e-2), []
    for _ in range(150):
        loss = mse_loss(layer(x).reconstruction, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.normalize_decoder()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * min(losses[0], float(x.var()))
    torch.testing.assert_close(layer.W_dec.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize("training", [True, False])
def test_sparse_autoencoder_compiled_whole_matches_eager(layer, training):
    layer.train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (7, 9):
        inputs = torch.randn(n, DIM, requires_grad=True)
        results = []
        for function in (compiled, layer):
            out = function(inputs)
            grads = torch.autograd.grad(out.reconstruction.square().sum(), [inputs, *layer.parameters()])
            results.append((*out, *grads))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_autoencoder_half_precision_keeps_dtypes(layer, x, dtype):
    expected = layer(x.to(dtype).float())
    out = layer(x.to(dtype))
    assert [each.dtype for each in out] == [dtype, torch.float32, torch.int64]
    # Beside float32 parameters everything is computed in float32.
    assert torch.equal(out.values, expected.values)
    torch.testing.assert_close(out.reconstruction.float(), expected.reconstruction, rtol=0.01, atol=0.01)
    whole = copy.deepcopy(layer).to(dtype)
    half = x.detach().to(dtype).requires_grad_()
    out = whole(half)
    assert [each.dtype for each in out] == [dtype, torch.float32, torch.int64]
    grads = torch.autograd.grad(out.reconstruction.float().square().sum(), [half, *whole.parameters()])
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_autoencoder_autocast_keeps_dtypes(layer, dtype):
    linear = torch.nn.Linear(3, DIM)
    with torch.autocast("cpu", dtype):
        z = linear(torch.randn(10, 3))
        out = layer(z)
        assert out.reconstruction.dtype == z.dtype == dtype
    assert torch.equal(out.values, layer(z).values)
    out.reconstruction.float().square().mean().backward()
    for parameter in (*layer.parameters(), *linear.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_sparse_autoencoder_empty_batch_gives_empty_outputs(layer):
    x = torch.empty(0, 4, DIM, requires_grad=True)
    out = layer(x)
    assert [tuple(each.shape) for each in out] == [(0, 4, DIM), (0, 4, SELECTED), (0, 4, SELECTED)]
    out.reconstruction.sum().backward()
    assert not any(parameter.grad.any() for parameter in layer.parameters())


def test_sparse_autoencoder_state_dict_has_the_names_of_sparsify(layer, x):
    state = layer.state_dict()
    shapes = {name: tuple(each.shape) for name, each in state.items()}
    expected = {"encoder.weight": (ATOMS, DIM), "encoder.bias": (ATOMS,), "W_dec": (ATOMS, DIM), "b_dec": (DIM,)}
    assert shapes == expected
    other = SparseAutoencoder(DIM, ATOMS, SELECTED)
    other.load_state_dict(state)
    assert torch.equal(other(x).reconstruction, layer(x).reconstruction)
    assert repr(other).startswith("SparseAutoencoder(\n  dim=6, num_atoms=40, k=5")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 5), r"expected x of shape \[..., 6\], with the D of encoder.weight, got \(2, 5\)"),
        (torch.zeros(()), r"expected x of shape .*, got \(\)"),
        (torch.zeros(2, DIM).int(), r"expected x of dtype .*, got torch.int32"),
        (torch.zeros(2, DIM).double(), r"expected x of the layer's dtype, torch.float32, .*, got torch.float64"),
        (torch.zeros(2, DIM, device="meta"), r"expected x on the device of encoder.weight, cpu, got meta"),
    ],
)
def test_sparse_autoencoder_bad_inputs_raise(layer, bad, message):
    with pytest.raises(ValueError, match=message):
        layer(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, ATOMS, SELECTED), r"expected dim to be an integer of at least 1, got 0"),
        ((DIM, 0, SELECTED), r"expected num_atoms to be an integer of at least 1, got 0"),
        ((DIM, ATOMS, 0), r"expected k to be an integer in \[1, 40\], got 0"),
        ((DIM, ATOMS, 41), r"expected k to be an integer in \[1, 40\], got 41"),
    ],
)
def test_sparse_autoencoder_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(*arguments)

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import mse_loss

from dlvae_kernels import DictionaryLearning
from dlvae_kernels.testing import assert_same_topk, exact_distances

from ..oracles import notebook

DIM, ATOMS, SELECTED = 6, 24, 5


def make(**options):
    return DictionaryLearning(DIM, ATOMS, 0.1, SELECTED, **options)


@pytest.fixture
def x():
    return torch.randn(3, DIM, 4, 5, requires_grad=True)


@pytest.mark.small
def test_dictionary_learning_step_equals_the_notebook(x):
    layer, formula = make(), notebook.DictionaryLearning(DIM, ATOMS, 0.1, SELECTED)
    formula.load_state_dict(layer.state_dict())
    twin = x.detach().clone().requires_grad_()
    for function, inputs in ((layer, x), (formula, twin)):
        loss, reconstruction, representation = function(inputs)
        (loss + reconstruction.square().sum() + representation.sin().sum()).backward()
    for actual, expected in zip(layer(x), formula(x), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(x.grad, twin.grad)
    for (name, actual), expected in zip(layer.named_parameters(), formula.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=name)


def test_dictionary_learning_selects_the_nearest_atoms(x):
    layer = make(representation="sparse")
    _, _, (values, indices) = layer(x)
    vectors = x.detach().permute(0, 2, 3, 1)
    chosen = indices.flatten(0, 2)
    distances = exact_distances(vectors.reshape(-1, DIM), layer.dictionary.detach()).gather(1, chosen).float()
    assert_same_topk(chosen, distances, vectors.reshape(-1, DIM), layer.dictionary.detach())
    softmax = layer.representation(vectors)
    torch.testing.assert_close(values, softmax.gather(-1, indices))


def test_dictionary_learning_dense_and_sparse_representations_agree(x):
    dense, sparse = make(), make(representation="sparse")
    sparse.load_state_dict(dense.state_dict())
    matrix, (values, indices) = dense(x)[2], sparse(x)[2]
    assert matrix.shape == (60, ATOMS)
    assert values.shape == indices.shape == (3, 4, 5, SELECTED)
    assert torch.equal(matrix.gather(1, indices.flatten(0, 2)), values.flatten(0, 2))
    assert (matrix != 0).sum() == 60 * SELECTED
    grads = [
        torch.autograd.grad(m.square().sum(), layer.dictionary, allow_unused=True) for m, layer in ((matrix, dense),)
    ]
    assert grads == [(None,)]


def test_dictionary_learning_map_keeps_its_order(x):
    layer = make()
    _, reconstruction, representation = layer(x)
    expected = (representation @ layer.dictionary).view(3, 4, 5, DIM)
    torch.testing.assert_close(reconstruction, expected.permute(0, 3, 1, 2))


def test_dictionary_learning_straight_through_output_is_the_reconstruction(x):
    layer = make()
    _, reconstruction, _ = layer(x)
    far = torch.full_like(reconstruction, 7.0)
    (to_x,) = torch.autograd.grad(reconstruction, x, far, retain_graph=True)
    assert torch.equal(to_x, far)
    unused = torch.autograd.grad(reconstruction, list(layer.parameters()), far, allow_unused=True)
    assert all(grad is None for grad in unused)
    values, indices = layer.encode(x)
    assert torch.equal(layer.decode(values, indices), reconstruction)


def test_dictionary_learning_direct_gradient_passes_coefficients_and_atoms(x):
    layer = make(gradient="direct")
    _, reconstruction, _ = layer(x)
    grads = torch.autograd.grad(reconstruction.square().sum(), [x, *layer.parameters()])
    vectors = x.detach().permute(0, 2, 3, 1).reshape(-1, DIM).requires_grad_()
    formula = notebook.DictionaryLearning(DIM, ATOMS, 0.1, SELECTED)
    formula.load_state_dict(layer.state_dict())
    _, indices = layer.encode(x)
    mask = torch.zeros(60, ATOMS).scatter(1, indices.flatten(0, 2), 1)
    decoded = (formula.representation(vectors) * mask) @ formula.dictionary
    expected = torch.autograd.grad(decoded.square().sum(), [vectors, *formula.parameters()])
    torch.testing.assert_close(grads[0].permute(0, 2, 3, 1).reshape(-1, DIM), expected[0])
    for actual, wanted in zip(grads[1:], expected[1:], strict=True):
        torch.testing.assert_close(actual, wanted)


def test_dictionary_learning_loss_does_not_grow_with_the_batch(x):
    layer = make()
    torch.testing.assert_close(layer(x)[0], layer(torch.cat([x] * 5))[0])


def test_dictionary_learning_sparsity_weights_the_mean_norm(x):
    with_norm, without = make(representation="sparse"), DictionaryLearning(DIM, ATOMS, 0.0, SELECTED)
    without.load_state_dict(with_norm.state_dict())
    loss, reconstruction, (values, _) = with_norm(x)
    torch.testing.assert_close(loss - without(x)[0], 0.1 * values.abs().sum(-1).mean())
    torch.testing.assert_close(without(x)[0], 1.25 * mse_loss(reconstruction, x))


@pytest.mark.parametrize("spatial", [(), (7,), (2, 3, 4)])
def test_dictionary_learning_maps_of_any_rank_and_channel_last_agree(spatial):
    layer, last = make(), make(channel_last=True)
    last.load_state_dict(layer.state_dict())
    x = torch.randn(2, DIM, *spatial)
    outs = layer(x), last(x.movedim(1, -1))
    torch.testing.assert_close(outs[0][0], outs[1][0])
    assert outs[0][1].shape == x.shape
    torch.testing.assert_close(outs[0][1].movedim(1, -1), outs[1][1])
    assert layer.encode(x).indices.shape == (2, *spatial, SELECTED)
    torch.testing.assert_close(layer.decode(*layer.encode(x)), outs[0][1])
    torch.testing.assert_close(last.decode(*layer.encode(x)), outs[1][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dictionary_learning_autocast_keeps_dtypes(dtype):
    layer = make(gradient="direct")
    convolution = torch.nn.Conv2d(3, DIM, 1)
    with torch.autocast("cpu", dtype):
        z = convolution(torch.randn(2, 3, 8, 8))
        loss, reconstruction, _ = layer(z)
        assert reconstruction.dtype == z.dtype == dtype
        assert loss.dtype == torch.float32
        total = loss + reconstruction.float().square().mean()
    total.backward()
    for parameter in (*layer.parameters(), *convolution.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"gradient": "direct", "representation": "sparse"}])
def test_dictionary_learning_compiled_whole_matches_eager(training, options):
    layer = make(**options).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (4, 6):
        x = torch.randn(batch, DIM, 5, 5)
        results = []
        for function, owner in ((compiled, layer), (twin, twin)):
            z = x.clone().requires_grad_()
            loss, reconstruction, _ = function(z)
            (loss + reconstruction.square().sum()).backward()
            results.append((loss, reconstruction, z.grad, owner.dictionary.grad))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_dictionary_learning_compiled_by_inductor_matches_eager():
    layer = make()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, DIM, 5, 5, requires_grad=True)
    for training in (True, False):
        loss, reconstruction, _ = compiled.train(training)(x)
        (loss + reconstruction.sum()).backward()
        torch.testing.assert_close(reconstruction, layer(x)[1])


def test_dictionary_learning_loads_a_notebook_checkpoint(x):
    state = {
        "dictionary": torch.rand(ATOMS, DIM),
        "representation.0.weight": torch.randn(ATOMS, DIM),
        "representation.0.bias": torch.randn(ATOMS),
    }
    layer = make()
    layer.load_state_dict(state)
    assert set(layer.state_dict()) == set(state)
    assert torch.equal(layer.dictionary, state["dictionary"])


def test_dictionary_learning_half_precision_beside_float32_is_close(x):
    layer = make()
    _, reconstruction, _ = layer(x.bfloat16())
    assert reconstruction.dtype == torch.bfloat16
    torch.testing.assert_close(reconstruction.float(), layer(x)[1], rtol=0.05, atol=0.05)


def test_dictionary_learning_empty_batch_gives_empty_outputs():
    loss, reconstruction, representation = make()(torch.empty(0, DIM, 4, 4))
    assert float(loss.detach()) == 0
    assert reconstruction.shape == (0, DIM, 4, 4)
    assert representation.shape == (0, ATOMS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4), r"expected x of shape \[B, 6, ...\], got \(4,\)"),
        (torch.zeros(2, 5, 4, 4), r"expected x of shape \[B, 6, ...\], got \(2, 5, 4, 4\)"),
        (torch.zeros(2, DIM, 4, 4).int(), r"expected x of dtype .*, got torch.int32"),
        (torch.zeros(2, DIM, 4, 4).double(), r"expected x of the layer's dtype, torch.float32, .*, got torch.float64"),
        (torch.zeros(2, DIM, 4, 4, device="meta"), r"expected x on the device of dictionary, cpu, got meta"),
    ],
)
def test_dictionary_learning_bad_inputs_raise(bad, message):
    with pytest.raises(ValueError, match=message):
        make()(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, ATOMS, 0.1, SELECTED), r"expected dim to be an integer of at least 1, got 0"),
        ((DIM, 0, 0.1, SELECTED), r"expected num_atoms to be an integer of at least 1, got 0"),
        ((DIM, ATOMS, -0.1, SELECTED), r"expected sparsity to be at least 0, got -0.1"),
        ((DIM, ATOMS, 0.1, 0), r"expected sparsity_level to be an integer in \[1, 24\], got 0"),
        ((DIM, ATOMS, 0.1, 25), r"expected sparsity_level to be an integer in \[1, 24\], got 25"),
    ],
)
def test_dictionary_learning_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        DictionaryLearning(*arguments)


def test_dictionary_learning_bad_options_raise():
    with pytest.raises(ValueError, match=r"expected representation to be one of 'dense', 'sparse', got 'matrix'"):
        make(representation="matrix")
    with pytest.raises(ValueError, match=r"expected gradient to be one of .*, got 'both'"):
        make(gradient="both")
    with pytest.raises(ValueError, match=r"expected indices in \[0, 24\), got 24"):
        make().decode(torch.ones(1, 1), torch.tensor([[24]]))
    with pytest.raises(ValueError, match=r"expected indices of shape \[B, \*spatial, k\].*, got \(1,\)"):
        make().decode(torch.ones(1), torch.tensor([0]))

"""Behaviour that both vector quantizers share; the moving averages have their own file."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dlvae_kernels import VectorQuantizer, VectorQuantizerEMA

from ..oracles import notebook

K, D = 24, 6


def make(kind, **options):
    if kind == "ema":
        return VectorQuantizerEMA(K, D, 0.25, 0.9, **options)
    return VectorQuantizer(K, D, 0.25, **options)


both = pytest.mark.parametrize("kind", ["gradient", "ema"])


@pytest.fixture
def inputs():
    return torch.randn(3, D, 4, 5, requires_grad=True)


@pytest.mark.small
def test_quantizer_step_equals_the_notebook(inputs):
    layer = VectorQuantizer(K, D, 0.25, init="normal")
    formula = notebook.VectorQuantizer(layer.codebook.detach(), 0.25)
    twin = inputs.detach().clone().requires_grad_()
    for actual, expected in zip(layer(inputs), formula(twin), strict=True):
        torch.testing.assert_close(actual, expected)
    for function, x in ((layer, inputs), (formula, twin)):
        loss, quantized, *_ = function(x)
        (loss + quantized.square().sum()).backward()
    torch.testing.assert_close(inputs.grad, twin.grad)
    torch.testing.assert_close(layer.codebook.grad, formula.codebook.grad)


@both
def test_quantizer_gives_the_nearest_code_and_not_the_farthest(kind, inputs):
    layer = make(kind, encodings="indices", init="normal").eval()
    _, quantized, _, indices = layer(inputs)
    error = (quantized - inputs).square().sum(1)
    for code in layer.codebook:
        assert (error <= (code.view(1, D, 1, 1) - inputs).square().sum(1) + 1e-5).all()
    assert torch.equal(layer.decode(indices), quantized)


@both
def test_quantizer_outputs_have_their_shapes_and_types(kind, inputs):
    loss, quantized, perplexity, encodings = make(kind)(inputs)
    assert loss.shape == perplexity.shape == ()
    assert quantized.shape == inputs.shape
    assert encodings.shape == (60, K)
    assert encodings.dtype == torch.float32
    _, _, _, indices = make(kind, encodings="indices")(inputs)
    assert indices.shape == (3, 4, 5)
    assert indices.dtype == torch.int64


@both
def test_quantizer_perplexity_by_hand(kind):
    layer = make(kind).eval()
    with torch.no_grad():
        layer.codebook.copy_(10 * torch.arange(K)[:, None].expand(K, D))
    x = layer.codebook[[0, 0, 1, 2]].T.reshape(1, D, 4).clone()
    # Shares 1/2, 1/4, 1/4: entropy 1.5 bits.
    assert float(layer(x)[2]) == pytest.approx(2**1.5)


@both
@pytest.mark.parametrize("spatial", [(), (7,), (4, 5), (2, 3, 4)])
def test_quantizer_maps_of_any_rank_and_channel_last_agree(kind, spatial):
    layer = make(kind, encodings="indices", init="normal").eval()
    last = make(kind, encodings="indices", channel_last=True).eval()
    last.load_state_dict(layer.state_dict())
    x = torch.randn(2, D, *spatial)
    _, quantized, _, indices = layer(x)
    assert quantized.shape == x.shape
    assert indices.shape == (2, *spatial)
    assert torch.equal(layer.encode(x), indices)
    assert torch.equal(layer.decode(indices), quantized)
    _, quantized_last, _, indices_last = last(x.movedim(1, -1))
    assert torch.equal(indices_last, indices)
    assert torch.equal(quantized_last, quantized.movedim(1, -1))
    assert torch.equal(last.decode(indices), quantized_last)


@both
def test_quantizer_keeps_the_memory_format(kind, inputs):
    layer = make(kind).eval()
    for layout in (torch.contiguous_format, torch.channels_last):
        _, quantized, *_ = layer(inputs.contiguous(memory_format=layout))
        assert quantized.is_contiguous(memory_format=layout)


@both
def test_quantizer_straight_through_gradient_is_the_commitment_alone(kind, inputs):
    layer = make(kind)
    loss, quantized, *_ = layer(inputs)
    grad = torch.randn_like(quantized)
    (from_output,) = torch.autograd.grad(quantized, inputs, grad, retain_graph=True)
    assert torch.equal(from_output, grad)
    (from_loss,) = torch.autograd.grad(loss, inputs)
    # Only the commitment term, times beta, reaches the input.
    torch.testing.assert_close(from_loss, 0.25 * 2 * (inputs - quantized).detach() / inputs.numel())


def test_quantizer_codebook_has_a_gradient(inputs):
    layer = VectorQuantizer(K, D, 0.25)
    layer(inputs)[0].backward()
    assert layer.codebook.grad is not None
    assert layer.codebook.grad.any()


@both
def test_quantizer_empty_batch_gives_empty_outputs(kind):
    loss, quantized, perplexity, encodings = make(kind, dead_code_threshold=1.0)(torch.empty(0, D, 4, 4))
    assert loss.item() == 0
    assert quantized.shape == (0, D, 4, 4)
    assert encodings.shape == (0, K)
    assert float(perplexity) == 1


@both
def test_quantizer_initial_codes_lie_in_their_ranges(kind):
    uniform, normal = (make(kind, init=init).codebook for init in ("uniform", "normal"))
    assert uniform.abs().max() <= 1 / K
    assert uniform.abs().max() > 0.5 / K
    assert 0.7 < normal.std() < 1.3


@both
@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_quantizer_first_training_batch_initialises_the_codebook(kind, init):
    centres = 10 * torch.randn(4, D)
    x = (centres[torch.arange(4000) % 4] + 0.01 * torch.randn(4000, D)).view(100, 40, D).transpose(1, 2)
    layer = make(kind, init=init)
    layer.eval()(x)
    assert not layer.codebook.any()
    layer.train()(x[:0])
    assert not layer.codebook.any()
    _, quantized, *_ = layer.train()(x)
    assert (quantized - x).abs().max() < 0.1
    if init == "data":
        # The codes are vectors of the batch, all different; one step of the averages may have moved them.
        nearest = torch.cdist(layer.codebook.detach(), x.transpose(1, 2).reshape(-1, D)).amin(1)
        assert nearest.max() < 0.05
        assert len(layer.codebook.unique(dim=0)) == K
    second = layer.codebook.detach().clone()
    layer.eval()(x + 100)
    assert torch.equal(layer.codebook, second)


@both
def test_quantizer_initialisation_follows_the_seed(kind):
    x = torch.randn(8, D, 5, 5)
    codebooks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layer = make(kind, init="kmeans")
        layer(x)
        codebooks.append(layer.codebook.detach())
    assert torch.equal(codebooks[0], codebooks[1])
    assert not torch.equal(codebooks[0], codebooks[2])


@both
def test_quantizer_loaded_codebook_is_not_initialised_again(kind):
    trained = make(kind, init="data")
    trained(torch.randn(8, D, 5, 5))
    fresh = make(kind, init="data")
    fresh.load_state_dict(trained.state_dict())
    with torch.no_grad():
        fresh.eval()(torch.randn(8, D, 5, 5) + 50)
        fresh.train()(torch.empty(0, D, 5, 5))
    assert torch.equal(fresh.codebook, trained.codebook)


@both
def test_quantizer_state_dict_without_codebook_stays_uninitialised(kind):
    x = torch.randn(8, D, 5, 5)
    fresh = make(kind, init="data")
    fresh.load_state_dict(make(kind, init="data").state_dict())
    fresh.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict({"_embedding.weight": torch.ones(K + 1, D)}, strict=False)
    fresh(x)
    assert fresh.codebook.any()


@both
def test_quantizer_dead_codes_are_reinitialised_and_stay(kind):
    layer = make(kind, init="normal", dead_code_threshold=0.5, encodings="indices")
    with torch.no_grad():
        layer.codebook[5:] = 1e3
        if kind == "ema":
            layer._ema_w[5:] = 1e3
    data = torch.randn(400, D)
    for _ in range(300):
        layer(data[torch.randperm(400)[:200]].view(10, 20, D).transpose(1, 2))
    assert layer.codebook.detach().abs().max() < 10
    if kind == "ema":
        torch.testing.assert_close(
            layer._ema_w / layer._ema_cluster_size[:, None], layer.codebook, rtol=1e-3, atol=1e-3
        )


@both
@pytest.mark.parametrize("init", ["normal", "kmeans"])
def test_quantizer_inputs_not_finite_leave_the_state_finite(kind, init):
    layer = make(kind, init=init, dead_code_threshold=1.0)
    for _ in range(5):
        x = torch.randn(4, D, 5, 5)
        x[::2, 0, 1:3] = float("inf")
        x[1, 1] = float("nan")
        layer(x)
    assert all(torch.isfinite(value).all() for value in layer.state_dict().values())


@both
def test_quantizer_with_threshold_zero_leaves_dead_codes(kind):
    layer = make(kind, init="normal", dead_code_threshold=0)
    with torch.no_grad():
        layer.codebook[5:] = 1e3
    for _ in range(5):
        layer(torch.randn(10, D, 20))
    assert (layer.codebook[5:] == 1e3).all()


@both
def test_quantizer_eval_changes_nothing(kind, inputs):
    layer = make(kind, dead_code_threshold=100.0, init="normal").eval()
    before = copy.deepcopy(layer.state_dict())
    layer(inputs)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizer_autocast_keeps_dtypes(kind, dtype):
    torch.manual_seed(0)
    layer = make(kind, init="normal", dead_code_threshold=0.1)
    convolution = torch.nn.Conv2d(3, D, 1)
    with torch.autocast("cpu", dtype):
        z = convolution(torch.randn(2, 3, 8, 8))
        loss, quantized, perplexity, _ = layer(z)
        assert z.dtype == quantized.dtype == dtype
        assert loss.dtype == perplexity.dtype == torch.float32
        total = loss + quantized.float().square().mean()
    total.backward()
    assert torch.isfinite(convolution.weight.grad).all()
    assert layer.codebook.dtype == torch.float32


@both
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"init": "kmeans", "dead_code_threshold": 1.0, "encodings": "indices"}])
def test_quantizer_compiled_whole_matches_eager(kind, training, options):
    torch.manual_seed(0)
    layer = make(kind, **options).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (4, 4, 6):
        x = torch.randn(batch, D, 5, 5)
        results = []
        for function in (compiled, twin):
            torch.manual_seed(batch)
            z = x.clone().requires_grad_()
            out = function(z)
            (out[0] + out[1].square().sum()).backward()
            results.append((*out, z.grad))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


@both
@pytest.mark.slow
def test_quantizer_compiled_by_inductor_matches_eager(kind):
    layer = make(kind, dead_code_threshold=1.0, init="normal")
    twin = copy.deepcopy(layer).eval()
    compiled = torch.compile(layer, fullgraph=True)
    for training in (True, False):
        compiled.train(training)
        x = torch.randn(4, D, 5, 5, requires_grad=True)
        loss, quantized, _, encodings = compiled(x)
        (loss + quantized.sum()).backward()
        if not training:
            twin.load_state_dict(layer.state_dict())
            torch.testing.assert_close(twin(x)[1], quantized)
            assert torch.equal(twin(x)[3], encodings)


@both
def test_quantizer_activation_checkpointing_updates_once(kind):
    for reentrant in (True, False):
        layer = make(kind, init="normal", dead_code_threshold=1e-3)
        twin = copy.deepcopy(layer)
        x = torch.randn(4, D, 5, 5, requires_grad=True)
        torch.manual_seed(1)
        out = torch.utils.checkpoint.checkpoint(lambda z, m=layer: m(z)[:2], x, use_reentrant=reentrant)
        (out[0] + out[1].sum()).backward()
        torch.manual_seed(1)
        twin(x.detach())
        for name, value in twin.state_dict().items():
            assert torch.equal(value, layer.state_dict()[name])


@both
@pytest.mark.parametrize("options", [{}, {"init": "data"}, {"init": "data", "dead_code_threshold": 0.1}])
def test_quantizer_activation_checkpointing_keeps_the_random_stream(kind, options):
    grads = []
    for reentrant in (None, True, False):
        torch.manual_seed(2)
        layer, x = make(kind, **options), torch.randn(4, D, 5, 5, requires_grad=True)

        def block(z, layer=layer):
            # The gradient of the product is the dropped map of the first pass, and none of the codebook's.
            return torch.nn.functional.dropout(layer(z)[1], 0.5)

        out = block(x) if reentrant is None else torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@both
def test_quantizer_counts_stay_float32(kind):
    layer = make(kind, dead_code_threshold=0.1).double().to(torch.bfloat16)
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.float32, torch.int64}
    x = torch.randn(4, D, 50, dtype=torch.bfloat16)
    for _ in range(50):
        layer(x)
    counts = layer._ema_cluster_size if kind == "ema" else layer._average_use
    assert counts.sum() > 30


@both
def test_quantizer_copy_and_pickle_give_equal_outputs(kind, inputs):
    layer = make(kind, init="normal").eval()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(inputs)[1], layer(inputs)[1])


def test_quantizer_state_dict_has_the_keys_of_the_notebook():
    assert list(VectorQuantizer(K, D, 0.25).state_dict()) == ["_embedding.weight"]
    ema = VectorQuantizerEMA(K, D, 0.25, 0.99)
    assert set(ema.state_dict()) == {"_embedding.weight", "_ema_cluster_size", "_ema_w"}


def test_quantizer_checkpoint_without_counts_loads():
    layer = VectorQuantizer(K, D, 0.25, dead_code_threshold=1.0)
    weight = torch.randn(K, D)
    layer.load_state_dict({"_embedding.weight": weight})
    assert torch.equal(layer.codebook, weight)
    without = VectorQuantizer(K, D, 0.25)
    without.load_state_dict(layer.state_dict())
    assert torch.equal(without.codebook, weight)


@both
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4), r"expected inputs of shape \[B, 6, ...\], got \(4,\)"),
        (torch.zeros(2, 5, 4, 4), r"expected inputs of shape \[B, 6, ...\], got \(2, 5, 4, 4\)"),
        (torch.zeros(2, D, 4, 4, dtype=torch.int32), r"expected inputs of dtype .*, got torch.int32"),
        (
            torch.zeros(2, D, 4, 4, dtype=torch.float64),
            r"expected inputs of the layer's dtype, torch.float32, or of half precision for a float32 layer, got"
            r" torch.float64; pass inputs.to\(torch.float32\) or call .to\(torch.float64\) on the layer",
        ),
        (torch.zeros(2, D, 4, 4, device="meta"), r"expected inputs on the device of codebook, cpu, got meta"),
    ],
)
def test_quantizer_bad_inputs_raise_and_change_nothing(kind, bad, message):
    layer = make(kind, init="data", dead_code_threshold=1.0)
    before = copy.deepcopy(layer.state_dict())
    for function in (layer, layer.encode):
        with pytest.raises(ValueError, match=message):
            function(bad)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@both
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([[0, K]]), rf"expected indices in \[-1, {K}\) .*, got {K}"),
        (torch.tensor([[-2, 0]]), rf"expected indices in \[-1, {K}\) .*, got -2"),
        (torch.tensor([[0.0]]), r"expected indices of dtype .*, got torch.float32"),
        (torch.tensor(0), r"expected indices of shape \[B, \*spatial\], got \(\)"),
    ],
)
def test_quantizer_bad_indices_raise(kind, indices, message):
    with pytest.raises(ValueError, match=message):
        make(kind).decode(indices)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, D, 0.25), {}, r"expected num_embeddings to be an integer of at least 1, got 0"),
        ((K, 0, 0.25), {}, r"expected embedding_dim to be an integer of at least 1, got 0"),
        ((K, D, -0.25), {}, r"expected commitment_cost to be at least 0, got -0.25"),
        ((K, D, 0.25), {"encodings": "dense"}, r"expected encodings to be one of 'one_hot', 'indices', got 'dense'"),
        ((K, D, 0.25), {"init": "zeros"}, r"expected init to be one of .*, got 'zeros'"),
        ((K, D, 0.25), {"dead_code_threshold": -1}, r"expected dead_code_threshold to be at least 0, got -1"),
    ],
)
def test_quantizer_bad_arguments_raise(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(*arguments, **options)
    with pytest.raises(ValueError, match=message):
        VectorQuantizerEMA(*arguments, 0.99, **options)

"""The compatible quantizers with safetensors, activation checkpointing, torch.func, mixed dtypes and two forwards."""

from __future__ import annotations

import io

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dlvae_kernels.compat.vector_quantize_pytorch import ResidualLFQ, ResidualVQ, VectorQuantize

LEARNABLE = {"learnable_codebook": True, "ema_update": False}


def _residual_vq(**arguments) -> ResidualVQ:
    return ResidualVQ(dim=8, num_quantizers=3, codebook_size=16, **arguments)


def _after_eval() -> tuple[ResidualVQ, torch.Tensor]:
    """A layer whose codebooks an eval forward has made views of one tensor."""
    layer, x = _residual_vq(), torch.randn(2, 20, 8)
    layer.eval()(x)
    return layer, x


def test_safetensors_saves_residual_vq_after_eval(tmp_path):
    layer, x = _after_eval()
    save_model(layer, str(tmp_path / "layer.safetensors"))
    other = _residual_vq().eval()
    load_model(other, str(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x)[0], layer(x)[0])


def test_state_dict_of_one_level_after_eval_holds_one_codebook():
    layer, x = _after_eval()
    state = layer.layers[1].state_dict()
    assert state["_codebook.embed"].untyped_storage().nbytes() == 16 * 8 * 4
    expected = layer(x)[0]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = _residual_vq().eval()
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x)[0], expected)


def test_torch_func_grad_of_residual_vq_in_eval_mode_works():
    layer, x = _residual_vq(**LEARNABLE).eval(), torch.randn(2, 20, 8)
    layer.requires_grad_(False)
    names = dict(layer.named_buffers())

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(layer, names, (x,))[0] - x).square().sum()

    grad = torch.func.grad(loss)(x)
    assert torch.allclose(grad, 2 * (x - layer(x)[0]))


def test_residual_vq_of_inference_mode_runs_outside_it():
    x = torch.randn(2, 20, 8)
    with torch.inference_mode():
        layer = _residual_vq().eval()
        expected = layer(x)[0].clone()
    assert torch.equal(layer(x)[0], expected)


def test_residual_vq_in_shared_memory_stays_there_in_eval_mode():
    layer = _residual_vq().eval().share_memory()
    layer(torch.randn(2, 20, 8))
    assert all(buffer.is_shared() for buffer in layer.buffers())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(
    "arguments", [{}, {"shared_codebook": True}, {"use_cosine_sim": True}, {"kmeans_init": True}], ids=str
)
def test_recomputation_repeats_random_numbers_and_keeps_the_state(arguments, is_frozen, use_reentrant):
    layer = _residual_vq(threshold_ema_dead_code=2, freeze_codebook=is_frozen, **arguments)
    drawn, states = [], []

    def step(x: torch.Tensor) -> torch.Tensor:
        quantized = layer(x)[0]
        drawn.append(torch.rand(4))
        states.append({name: value.clone() for name, value in layer.state_dict().items()})
        return quantized

    x = torch.randn(2, 20, 8, requires_grad=True)
    with set_checkpoint_early_stop(False):
        checkpoint(step, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(*drawn)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_recomputation_with_a_shared_codebook_and_few_vectors_keeps_the_state():
    # Fewer vectors than dead codes leave dead codes, which a second replacement would change.
    layer = _residual_vq(threshold_ema_dead_code=2, shared_codebook=True, quant_grad_frac=0.5)
    states = []

    def step(x: torch.Tensor) -> torch.Tensor:
        quantized = layer(x)[0]
        states.append(layer.layers[0]._codebook.embed.clone())
        return quantized

    x = torch.randn(1, 2, 8, requires_grad=True)
    with set_checkpoint_early_stop(False):
        checkpoint(step, x, use_reentrant=False).sum().backward()
    assert torch.equal(*states)


@pytest.mark.parametrize("active_only", [False, True])
def test_orthogonal_loss_of_two_forwards_has_one_backward(active_only):
    torch.manual_seed(0)
    layer = VectorQuantize(8, 16, orthogonal_reg_weight=1.0, orthogonal_reg_active_codes_only=active_only)
    losses = [layer(torch.randn(2, 20, 8))[2] for _ in range(2)]
    sum(losses).backward()
    assert layer._codebook.embed.grad.isfinite().all()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: VectorQuantize(8, 16, orthogonal_reg_weight=1.0),
        lambda: VectorQuantize(8, 16, manual_ema_update=True),
        lambda: VectorQuantize(8, 16, threshold_ema_dead_code=2, **LEARNABLE),
        lambda: _residual_vq(threshold_ema_dead_code=2),
        lambda: _residual_vq(shared_codebook=True),
        lambda: _residual_vq(**LEARNABLE),
    ],
    ids=["orthogonal", "manual", "revived", "residual", "shared", "learnable"],
)
def test_float64_and_float32_of_module_and_input_mix(make, mode, dtypes):
    layer = make().to(dtypes[0])
    layer.train(mode == "train")
    x = torch.randn(2, 20, 8, dtype=dtypes[1], requires_grad=True)
    quantized, _, loss = layer(x)
    assert quantized.dtype == x.dtype
    if mode == "train":
        (quantized.sum() + loss.sum()).backward()
        assert x.grad.isfinite().all()


def test_weighted_and_accumulated_updates_take_float64():
    x, layer = torch.randn(2, 20, 8, dtype=torch.float64), VectorQuantize(8, 16)
    layer(x, accum_ema_update=True)
    layer(x, accum_ema_update=True)
    layer(x, ema_update_weight=torch.rand(16))
    assert layer._codebook.embed_avg.grad is None
    assert layer._codebook.embed.isfinite().all()


@pytest.mark.parametrize("layers", ["one", "residual"])
def test_frozen_learnable_codebook_has_no_gradient_of_the_loss(layers):
    arguments = {"freeze_codebook": True, **LEARNABLE}
    layer = VectorQuantize(8, 16, **arguments) if layers == "one" else _residual_vq(**arguments)
    x = torch.randn(2, 20, 8, requires_grad=True)
    layer(x)[2].sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("make", [lambda **a: VectorQuantize(8, 16, **a), _residual_vq], ids=["one", "residual"])
def test_masked_nan_reaches_no_gradient_with_cosine(make):
    layer, x = make(use_cosine_sim=True), torch.randn(2, 20, 8)
    mask = torch.arange(20).expand(2, 20) < 12
    x[~mask] = torch.nan
    x.requires_grad_()
    quantized, _, loss = layer(x, mask=mask)
    (quantized.sum() + loss.sum()).backward()
    assert x.grad[mask].any()
    assert not x.grad[~mask].any()


@pytest.mark.parametrize("is_empty", [False, True])
def test_orthogonal_loss_of_active_codes_is_zero_without_a_vector(is_empty):
    layer = VectorQuantize(8, 16, orthogonal_reg_weight=1.0, orthogonal_reg_active_codes_only=True)
    x = torch.randn(2, 0 if is_empty else 20, 8, requires_grad=True)
    loss = layer(x, mask=torch.zeros(x.shape[:2], dtype=torch.bool))[2]
    loss.backward()
    assert loss == 0
    assert not layer._codebook.embed.grad.any()


def test_codebook_of_to_empty_and_load_state_dict_has_no_arbitrary_values():
    source = _residual_vq(threshold_ema_dead_code=2)
    with torch.device("meta"):
        layer = _residual_vq(threshold_ema_dead_code=2)
    layer.to_empty(device="cpu")
    for name, buffer in layer.named_buffers():
        buffer.fill_(1 if name.endswith("initted") else 7)
    layer.load_state_dict(source.state_dict())
    for (name, buffer), expected in zip(layer.named_buffers(), source.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_residual_lfq_with_dropout_compiles_whole():
    layer = ResidualLFQ(dim=8, num_quantizers=3, codebook_size=16, quantize_dropout=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = set()
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.randn(2, 5, 8, requires_grad=True)
        quantized, indices, losses = compiled(x)
        runs = (indices >= 0).flatten(0, 1).all(0)
        num_levels = int(runs.sum())
        found.add(num_levels)
        assert runs.tolist() == [True] * num_levels + [False] * (3 - num_levels)
        assert not losses[num_levels:].any()
        assert torch.allclose(quantized, layer.get_output_from_indices(indices), atol=1e-6)
        quantized.sum().backward()
        assert x.grad.isfinite().all()
    assert found == {1, 2, 3}

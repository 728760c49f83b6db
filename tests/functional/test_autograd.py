"""Each operation under autograd: in-place changes, forward mode, double backward, vmap and torch.func.grad."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dlvae_kernels import (
    code_entropy,
    ema_update,
    gather_codes,
    kept_softmax,
    nearest_code,
    residual_quantize,
    rotation_trick,
    sparse_decode,
    topk_codes,
    vector_quantize,
)
from dlvae_kernels.functional import ema_statistics, ema_step

OPS = ("ema_statistics", "ema_step", "nearest_code")
N, K, D, SELECTED = 7, 5, 4, 3


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def selected_indices() -> Tensor:
    return torch.rand(N, K).argsort(1)[:, :SELECTED]


# Each returns inputs that are differentiated, and the function to apply to them.
def _vector_quantize() -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    def function(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        out = vector_quantize(x, codebook)
        return out.quantized, out.codebook_loss, out.commitment_loss

    return tensors((N, D), (K, D)), function


def _vector_quantize_rotation() -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    def function(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        out = vector_quantize(x, codebook, gradient="rotation")
        return out.quantized, out.codebook_loss, out.commitment_loss

    return tensors((N, D), (K, D)), function


def _gather_codes() -> tuple[list[Tensor], Callable[..., Tensor]]:
    indices = torch.randint(0, K, (2, N))
    return tensors((K, D)), lambda codebook: gather_codes(codebook, indices)


def _rotation_trick() -> tuple[list[Tensor], Callable[..., Tensor]]:
    (q,) = tensors((N, D))
    return tensors((N, D)), lambda x: rotation_trick(x, q)


def _vector_quantize_heads_and_mask() -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    mask = torch.arange(N) % 3 != 1

    def function(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        out = vector_quantize(x, codebook, mask=mask)
        return out.quantized, out.codebook_loss, out.commitment_loss

    return tensors((N, 2, D), (2, K, D)), function


def _gather_codes_heads() -> tuple[list[Tensor], Callable[..., Tensor]]:
    indices = torch.randint(-1, K, (N, 2))
    return tensors((2, K, D)), lambda codebook: gather_codes(codebook, indices)


def _sparse_decode() -> tuple[list[Tensor], Callable[..., Tensor]]:
    indices = selected_indices()
    return tensors((N, SELECTED), (K, D)), lambda values, dictionary: sparse_decode(values, indices, dictionary)


def _topk_codes() -> tuple[list[Tensor], Callable[..., Tensor]]:
    def function(x: Tensor, dictionary: Tensor, bias: Tensor) -> Tensor:
        return topk_codes(x, dictionary, SELECTED, metric="dot", bias=bias)[1]

    return tensors((N, D), (K, D), (K,)), function


def _code_entropy() -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    return tensors((N, D), (K, D)), lambda x, codebook: tuple(code_entropy(x, codebook))


def _kept_softmax() -> tuple[list[Tensor], Callable[..., Tensor]]:
    indices = selected_indices()
    return tensors((N, D), (K, D), (K,)), lambda x, weight, bias: kept_softmax(x, weight, bias, indices)


def _residual_quantize() -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    def function(x: Tensor, codebooks: Tensor) -> tuple[Tensor, ...]:
        out = residual_quantize(x, codebooks, gradient="rotation_each")
        return out.quantized, out.codebook_loss, out.commitment_loss

    return tensors((N, D), (2, K, D)), function


FORWARD_MODE = {
    "vector_quantize": _vector_quantize,
    "vector_quantize, rotation": _vector_quantize_rotation,
    "vector_quantize, heads and mask": _vector_quantize_heads_and_mask,
    "gather_codes": _gather_codes,
    "gather_codes, heads": _gather_codes_heads,
    "rotation_trick": _rotation_trick,
    "sparse_decode": _sparse_decode,
    "topk_codes": _topk_codes,
}
REVERSE_MODE = {"code_entropy": _code_entropy, "kept_softmax": _kept_softmax, "residual_quantize": _residual_quantize}
DIFFERENTIABLE = {**FORWARD_MODE, **REVERSE_MODE}


def flat(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs.flatten() if isinstance(outputs, Tensor) else torch.cat([each.flatten() for each in outputs])


def jacobian_product(function: Callable[..., Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """The directional derivative by reverse mode, one output at a time."""
    wanted = [each.clone().requires_grad_() for each in inputs]
    outputs = flat(function(*wanted))
    found = []
    for output in outputs:
        grads = torch.autograd.grad(output, wanted, retain_graph=True, allow_unused=True)
        found.append(sum((g * t).sum() for g, t in zip(grads, tangents, strict=True) if g is not None))
    return torch.stack(found)


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_jvp_all_inputs_equals_reverse_mode(name):
    inputs, function = FORWARD_MODE[name]()
    tangents = [torch.randn_like(each) for each in inputs]
    _, tangent = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(flat(tangent), jacobian_product(function, inputs, tangents))


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_dual_tensor_one_input_equals_reverse_mode(name):
    inputs, function = FORWARD_MODE[name]()
    for i in range(len(inputs)):
        tangents = [torch.randn_like(each) * (j == i) for j, each in enumerate(inputs)]
        with forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(x, t) if j == i else x
                for j, (x, t) in enumerate(zip(inputs, tangents, strict=True))
            ]
            outputs = function(*dual)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            found = [forward_ad.unpack_dual(each).tangent for each in outputs]
            found = [torch.zeros_like(o) if f is None else f for o, f in zip(outputs, found, strict=True)]
        torch.testing.assert_close(flat(tuple(found)), jacobian_product(function, inputs, tangents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jvp_straight_through_output_is_the_tangent(dtype):
    x, tangent, codebook = tensors((N, D), (N, D), (K, D), dtype=dtype)
    _, found = torch.func.jvp(lambda x: vector_quantize(x, codebook).quantized, (x,), (tangent,))
    assert torch.equal(found, tangent)


@pytest.mark.parametrize("name", REVERSE_MODE)
def test_jvp_without_forward_mode_raises(name):
    inputs, function = REVERSE_MODE[name]()
    with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative; use reverse mode"):
        torch.func.jvp(function, tuple(inputs), tuple(inputs))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_double_backward_raises(name):
    inputs, function = DIFFERENTIABLE[name]()
    wanted = [each.requires_grad_() for each in inputs]
    grads = torch.autograd.grad(flat(function(*wanted)).square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("transform", ["autograd", "func"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_double_backward_of_a_sum_raises_where_its_gradient_is_no_constant(name, transform):
    def gradients(*inputs):
        def total(*args):
            return flat(function(*args)).sum()

        if transform == "func":
            return torch.func.grad(total, tuple(range(len(inputs))))(*inputs)
        wanted = [each if each.requires_grad else each.clone().requires_grad_() for each in inputs]
        return torch.autograd.grad(total(*wanted), wanted, create_graph=True)

    inputs, function = DIFFERENTIABLE[name]()
    others = [torch.randn_like(each) for each in inputs]
    is_constant = all(map(torch.equal, gradients(*inputs), gradients(*others)))
    assert is_constant == name.startswith("gather_codes")
    if transform == "func":
        penalty = torch.func.grad(lambda *args: sum(grad.square().sum() for grad in gradients(*args)))
    else:
        wanted = [each.requires_grad_() for each in inputs]

        def penalty(*_):
            total = sum(grad.square().sum() for grad in gradients(*wanted))
            if total.requires_grad:
                total.backward()

    with nullcontext() if is_constant else pytest.raises(RuntimeError, match="has no second derivative"):
        penalty(*inputs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_func_grad_equals_autograd(name):
    inputs, function = DIFFERENTIABLE[name]()
    found = torch.func.grad(lambda *args: flat(function(*args)).square().sum(), tuple(range(len(inputs))))(*inputs)
    wanted = [each.clone().requires_grad_() for each in inputs]
    expected = torch.autograd.grad(flat(function(*wanted)).square().sum(), wanted)
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, exact)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_over_all_inputs_equals_a_loop(name):
    batches = [DIFFERENTIABLE[name]()[0] for _ in range(3)]
    _, function = DIFFERENTIABLE[name]()
    stacked = [torch.stack(each) for each in zip(*batches, strict=True)]
    found = torch.func.vmap(lambda *args: flat(function(*args)))(*stacked)
    expected = torch.stack([flat(function(*batch)) for batch in batches])
    torch.testing.assert_close(found, expected)
    found = torch.func.vmap(torch.func.grad(lambda *args: flat(function(*args)).square().sum()))(*stacked)
    for actual, batch in zip(found, batches, strict=True):
        first = batch[0].clone().requires_grad_()
        (exact,) = torch.autograd.grad(flat(function(first, *batch[1:])).square().sum(), first)
        torch.testing.assert_close(actual, exact)


def ema_state(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    codebook = torch.randn(K, D, device=device)
    return codebook, torch.ones(K, device=device), codebook.clone()


@pytest.mark.parametrize("call", ["ema_step", "ema_update"])
def test_ema_backward_through_the_previous_codebook_raises(device, call):
    codebook, size, total = ema_state(device)
    h = torch.randn(16, D, device=device, requires_grad=True)
    loss = (h @ codebook.T).square().sum()
    versions = [tensor._version for tensor in (codebook, size, total)]
    x = h.detach()
    indices = nearest_code(x, codebook)
    if call == "ema_step":
        ema_step(codebook, size, total, ema_statistics(x, indices, K), decay=0.5, epsilon=1e-5)
    else:
        ema_update(codebook, size, total, x, indices, decay=0.5, epsilon=1e-5)
    assert all(t._version > v for t, v in zip((codebook, size, total), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["codebook", "cluster_size", "embed_sum"])
def test_ema_update_state_that_requires_grad_raises(name):
    state = dict(zip(("codebook", "cluster_size", "embed_sum"), ema_state(torch.device("cpu")), strict=True))
    state[name].requires_grad_()
    x, indices = torch.randn(9, D), torch.randint(0, K, (9,))
    before = {key: value.detach().clone() for key, value in state.items()}
    with pytest.raises(ValueError, match=f"expected {name} without requires_grad, since it is changed in place"):
        ema_update(**state, x=x, indices=indices, decay=0.5, epsilon=1e-5)
    assert all(torch.equal(before[key], state[key]) for key in state)
    with torch.no_grad():
        ema_update(**state, x=x, indices=indices, decay=0.5, epsilon=1e-5)
    assert not torch.equal(before["embed_sum"], state["embed_sum"])


def test_ema_step_compiled_graph_is_seen_by_autograd():
    codebook, size, total = ema_state(torch.device("cpu"))
    x, h = torch.randn(9, D), torch.randn(16, D, requires_grad=True)
    loss = (h @ codebook.T).square().sum()
    step = torch.compile(ema_update, fullgraph=True, backend="aot_eager")
    step(codebook, size, total, x, nearest_code(x, codebook), decay=0.5, epsilon=1e-5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_ema_update_inference_mode_changes_the_codebook():
    with torch.inference_mode():
        codebook, size, total = ema_state(torch.device("cpu"))
        before = codebook.clone()
        ema_update(codebook, size, total, torch.randn(9, D), torch.zeros(9).long(), decay=0.5, epsilon=1e-5)
    assert not torch.equal(before, codebook)

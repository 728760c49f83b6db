from __future__ import annotations

import pytest
import torch

from dlvae_kernels import nearest_code, vector_quantize
from dlvae_kernels.testing import assert_accurate, assert_same_codes

from .cases import DTYPES, SIZES, layouts, vectors

OPS = ("vector_quantize_fwd", "vector_quantize_bwd")


@pytest.mark.small
@pytest.mark.every_isa
def test_vector_quantize_three_codes_by_hand(device):
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [9.0, 9.0]], device=device, requires_grad=True)
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0]], device=device, requires_grad=True)
    out = vector_quantize(x, codebook)
    assert out.quantized.tolist() == [[0, 0], [4, 0]]
    assert out.indices.tolist() == [0, 1]
    assert out.counts.tolist() == [1, 1, 0]
    # Squared errors 1 + 0 and 1 + 4 over 4 elements.
    assert out.codebook_loss.item() == out.commitment_loss.item() == 1.5
    (10 * out.quantized.sum() + out.codebook_loss + 100 * out.commitment_loss).backward()
    # d/dx of mean (q - x)^2 is -(q - x) / 2, d/dq its negative.
    assert x.grad.tolist() == [[10 + 50, 10], [10 - 50, 10 + 100]]
    assert codebook.grad.tolist() == [[-0.5, 0], [0.5, -1], [0, 0]]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_vector_quantize_any_size_and_dtype_equals_float64(device, size, dtype):
    n, k, d = size
    x, codebook = vectors(n, d, device, dtype).requires_grad_(), vectors(k, d, device, dtype).requires_grad_()
    out = vector_quantize(x, codebook)
    assert out.quantized.dtype == dtype
    assert out.codebook_loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same_codes(out.indices, x.detach(), codebook.detach())
    assert torch.equal(out.quantized, codebook[out.indices])
    assert torch.equal(out.counts, torch.bincount(out.indices, minlength=k))
    grad = vectors(n, d, device, dtype)
    (out.quantized * grad).sum().backward(retain_graph=True)
    assert torch.equal(x.grad, grad)
    assert codebook.grad is None or not codebook.grad.any()
    x.grad = codebook.grad = None
    if n == 0:
        assert out.codebook_loss.item() == out.commitment_loss.item() == 0
        return
    (out.codebook_loss + 0.25 * out.commitment_loss).backward()

    def formula(to):
        rows_, codes = (t.detach().to(to).requires_grad_() for t in (x, codebook))
        q = codes[out.indices]
        loss = (q - rows_.detach()).square().mean() + 0.25 * (q.detach() - rows_).square().mean()
        loss.backward()
        return loss.detach(), rows_.grad, codes.grad

    exact, expression = formula(torch.float64), formula(dtype)
    actual = (out.codebook_loss + 0.25 * out.commitment_loss).detach(), x.grad, codebook.grad
    for each in zip(actual, exact, expression, strict=True):
        assert_accurate(*each, floor=1e-6 if dtype in (torch.float32, torch.float64) else 4e-3)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", layouts(2, 2, torch.device("cpu")))
def test_vector_quantize_any_strides_match_nearest_code(device, layout):
    x = layouts(50, 12, device)[layout].requires_grad_()
    codebook = vectors(24, 12, device)
    out = vector_quantize(x, codebook)
    assert torch.equal(out.quantized, codebook[nearest_code(x, codebook)])
    if layout != "expanded":
        assert out.quantized.stride() == torch.empty_like(x).stride()
    out.quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_vector_quantize_codebook_changed_before_the_backward_keeps_its_result(device):
    x, codebook = vectors(20, 4, device).requires_grad_(), vectors(5, 4, device)
    expected = vector_quantize(x, codebook.clone())
    (expected_grad,) = torch.autograd.grad(expected.commitment_loss, x)
    out = vector_quantize(x, codebook)
    codebook.zero_()
    (grad,) = torch.autograd.grad(out.commitment_loss, x)
    assert torch.equal(grad, expected_grad)


def test_vector_quantize_output_changed_before_the_backward_is_accepted(device):
    x = vectors(20, 4, device).requires_grad_()
    out = vector_quantize(x, vectors(5, 4, device))
    (out.quantized.relu_().sum() + out.commitment_loss).backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vector_quantize_gradient_of_half_vectors_beside_close_float32_codes_is_accurate(device, dtype):
    # Codes rounded to half precision would equal x.
    x = (1 + 1e-3 * vectors(400, 8, device)).to(dtype)
    codebook = (1 + 1e-3 * vectors(5, 8, device)).requires_grad_()
    out = vector_quantize(x, codebook)
    out.codebook_loss.backward()
    codes = codebook.detach().double().requires_grad_()
    (codes[out.indices] - x.double()).square().mean().backward()
    assert_accurate(codebook.grad, codes.grad, codes.grad, floor=1e-2)


@pytest.mark.float64
def test_vector_quantize_gradcheck_of_the_losses_passes(device):
    x, codebook = vectors(7, 3, device, torch.float64), vectors(4, 3, device, torch.float64)
    # The straight-through output has no true gradient; each loss has one with the other side held.
    assert torch.autograd.gradcheck(lambda c: vector_quantize(x, c).codebook_loss, codebook.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda r: vector_quantize(r, codebook).commitment_loss, x.clone().requires_grad_())


@pytest.mark.every_isa
def test_vector_quantize_each_loss_has_one_gradient(device):
    x, codebook = vectors(9, 3, device).requires_grad_(), vectors(4, 3, device).requires_grad_()
    out = vector_quantize(x, codebook)
    for loss, moves in ((out.codebook_loss, codebook), (out.commitment_loss, x)):
        grads = torch.autograd.grad(loss, (x, codebook), retain_graph=True)
        assert [bool(grad.any()) for grad in grads] == [moves is x, moves is codebook]


@pytest.mark.large
def test_vector_quantize_repeated_call_is_bitwise_reproducible(device):
    torch.use_deterministic_algorithms(False)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        x, codebook = vectors(4000, 16, device).requires_grad_(), vectors(7, 16, device).requires_grad_()
        out = vector_quantize(x, codebook)
        (out.codebook_loss + out.commitment_loss + out.quantized.sum()).backward()
        results.append([*(t.detach() for t in out), x.grad, codebook.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_vector_quantize_opcheck_passes(device):
    x, codebook = layouts(20, 6, device)["channel_first"], vectors(5, 6, device)
    torch.library.opcheck(torch.ops.dlvae.vector_quantize_fwd, (x, codebook, False, "float32", None))
    torch.library.opcheck(torch.ops.dlvae.vector_quantize_fwd, (x, codebook, True, "float32", None))
    _, indices, *_, error = torch.ops.dlvae.vector_quantize_fwd(x, codebook, True, "float32", None)
    one = torch.ones((), device=device)
    for needs in ((True, True), (True, False), (False, True)):
        args = (torch.randn_like(x), one, one, error, indices, 5, 1, *needs)
        torch.library.opcheck(torch.ops.dlvae.vector_quantize_bwd, args)


def test_vector_quantize_compiled_whole_matches_eager(device):
    x, codebook = vectors(40, 6, device).requires_grad_(), vectors(9, 6, device).requires_grad_()
    expected = vector_quantize(x, codebook)
    compiled = torch.compile(vector_quantize, fullgraph=True, backend="aot_eager")
    out = compiled(x, codebook)
    for name in out._fields:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=0, atol=0)
    grads = [torch.autograd.grad(o.codebook_loss + o.commitment_loss, (x, codebook)) for o in (out, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.every_isa
def test_vector_quantize_without_gradient_records_nothing(device):
    out = vector_quantize(vectors(4, 3, device), vectors(5, 3, device))
    assert out.quantized.grad_fn is None
    assert out.commitment_loss.grad_fn is None


def test_vector_quantize_bad_input_raises():
    with pytest.raises(ValueError, match=r"expected x of shape \[..., 2\], .*, got \(2, 3\)"):
        vector_quantize(torch.zeros(2, 3), torch.zeros(4, 2))

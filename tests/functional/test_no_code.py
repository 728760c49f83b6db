"""Vectors without a code: the index -1, and the mask of `vector_quantize`, which gives it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dlvae_kernels import gather_codes, one_hot, vector_quantize
from dlvae_kernels.functional import ema_statistics, straight_through

from .cases import DTYPES, layouts, vectors

OPS = (
    "vector_quantize_fwd",
    "vector_quantize_bwd",
    "gather_codes_fwd",
    "gather_codes_bwd",
    "ema_statistics",
    "one_hot",
)


def flags(*shape: int, device: torch.device) -> Tensor:
    """True for about half, and for the first."""
    chosen = torch.rand(shape, device=device) > 0.5
    chosen.view(-1)[:1] = True
    return chosen


@pytest.mark.small
@pytest.mark.every_isa
def test_mask_one_of_two_vectors_by_hand(device):
    x = torch.tensor([[1.0, 0.0], [torch.nan, 2.0]], device=device, requires_grad=True)
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0]], device=device, requires_grad=True)
    out = vector_quantize(x, codebook, mask=torch.tensor([True, False], device=device))
    assert out.quantized.tolist() == [[0, 0], [0, 0]]
    assert out.indices.tolist() == [0, -1]
    assert out.counts.tolist() == [1, 0]
    assert out.codebook_loss.item() == out.commitment_loss.item() == 0.5
    (10 * out.quantized.sum() + out.codebook_loss + 2 * out.commitment_loss).backward()
    assert x.grad.tolist() == [[12, 10], [0, 0]]
    assert codebook.grad.tolist() == [[-1, 0], [0, 0]]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(0, 5, 4), (1, 3, 7), (12, 9, 4), (300, 65, 16)])
def test_vector_quantize_masked_vectors_equal_removed_vectors(device, size, dtype):
    n, k, d = size
    x, codebook = vectors(n, d, device, dtype).requires_grad_(), vectors(k, d, device, dtype).requires_grad_()
    mask, grad = flags(n, device=device), vectors(n, d, device, dtype)
    with torch.no_grad():
        x[~mask] = torch.inf
    out, expected = vector_quantize(x, codebook, mask=mask), vector_quantize(x[mask], codebook)
    assert torch.equal(out.quantized[mask], expected.quantized)
    assert torch.equal(out.indices[mask], expected.indices)
    assert torch.equal(out.counts, expected.counts)
    assert not out.quantized[~mask].any()
    assert (out.indices[~mask] == -1).all()
    grads = []
    for each, upstream in ((out, grad), (expected, grad[mask])):
        torch.testing.assert_close(each.codebook_loss, expected.codebook_loss, rtol=1e-5, atol=0)
        loss = (each.quantized * upstream).sum() + 3 * each.codebook_loss + 0.25 * each.commitment_loss
        grads.append(torch.autograd.grad(loss, (x, codebook)))
    rtol = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    for actual, exact in zip(*grads, strict=True):
        torch.testing.assert_close(actual, exact, rtol=rtol, atol=1e-6 if rtol < 1e-3 else 2e-3)
    assert not grads[0][0][~mask].any()


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_vector_quantize_masked_nan_vector_has_no_gradient(device, gradient):
    x, codebook = vectors(6, 4, device), vectors(5, 4, device)
    x[2], mask = torch.nan, torch.arange(6, device=device) != 2
    upstream = vectors(6, 4, device)
    upstream[2] = torch.nan
    x.requires_grad_()
    out = vector_quantize(x, codebook, mask=mask, gradient=gradient)
    (actual,) = torch.autograd.grad((out.quantized, out.commitment_loss), x, (upstream, torch.ones_like(out[3])))
    alone = vector_quantize(x[mask], codebook, gradient=gradient)
    (expected,) = torch.autograd.grad(
        (alone.quantized, alone.commitment_loss), x, (upstream[mask], torch.ones_like(out[3]))
    )
    assert not actual[2].any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.every_isa
def test_vector_quantize_no_valid_vector_has_zero_losses_and_gradients(device):
    x, codebook = vectors(70, 4, device).requires_grad_(), vectors(9, 4, device).requires_grad_()
    out = vector_quantize(x, codebook, mask=torch.zeros(70, dtype=torch.bool, device=device))
    assert out.codebook_loss.item() == out.commitment_loss.item() == 0
    assert not out.counts.any()
    (out.quantized.sum() + out.codebook_loss + out.commitment_loss).backward()
    assert not x.grad.any()
    assert not codebook.grad.any()


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", layouts(2, 2, torch.device("cpu")))
def test_vector_quantize_mask_any_strides_equals_contiguous(device, layout):
    x = layouts(50, 12, device)[layout].requires_grad_()
    codebook, mask = vectors(24, 12, device), flags(*x.shape[:-1], device=device)
    out = vector_quantize(x, codebook, mask=mask.repeat_interleave(2, -1)[..., ::2] if mask.ndim else mask)
    copy = x.detach().contiguous().requires_grad_()
    expected = vector_quantize(copy, codebook, mask=mask)
    for name in out._fields:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-6, atol=0)
    for each in (out, expected):
        (each.quantized.sum() + each.commitment_loss).backward()
    torch.testing.assert_close(x.grad, copy.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.every_isa
def test_vector_quantize_mask_of_heads_or_of_all_heads(device):
    x, codebook = torch.randn(2, 30, 3, 4, device=device), torch.randn(3, 9, 4, device=device)
    mask = flags(2, 30, device=device)
    shared, each = (vector_quantize(x, codebook, mask=m) for m in (mask, mask[..., None].expand(2, 30, 3)))
    assert all(torch.equal(a, b) for a, b in zip(shared, each, strict=True))
    of_heads = flags(2, 30, 3, device=device)
    out = vector_quantize(x, codebook, mask=of_heads)
    assert torch.equal(out.indices < 0, ~of_heads)
    assert torch.equal(out.counts.sum(1), of_heads.sum((0, 1)))


@pytest.mark.every_isa
@pytest.mark.parametrize("heads", [(), (3,)])
def test_no_code_equals_removed_vectors(device, heads):
    indices = torch.randint(-1, 6, (200, *heads), device=device)
    x, codebook = torch.randn(200, *heads, 5, device=device), torch.randn(*heads, 6, 5, device=device).requires_grad_()
    gathered = gather_codes(codebook, indices)
    assert not gathered[indices < 0].any()
    grad = torch.randn_like(x)
    grad[indices < 0] = torch.nan
    (actual,) = torch.autograd.grad(gathered, codebook, grad)
    (expected,) = torch.autograd.grad(
        gather_codes(codebook, indices.clamp(min=0)), codebook, torch.where((indices < 0)[..., None], 0, grad)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    x[indices < 0] = torch.nan
    statistics = ema_statistics(x, indices, 6, num_heads=heads[0] if heads else None)
    kept = torch.where((indices < 0)[..., None], torch.inf, x)
    assert torch.equal(statistics, ema_statistics(kept, indices.clamp(min=0), 6, num_heads=heads[0] if heads else None))
    assert int(statistics[..., -1].sum()) == int((indices >= 0).sum())


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_one_hot_no_code_gives_no_one(device, dtype):
    indices = torch.tensor([[2, -1], [-1, -1], [0, 2]], device=device)
    assert one_hot(indices, 3, dtype=dtype).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert one_hot(indices[:, 1], 3, dtype=dtype).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_straight_through_no_code_has_no_gradient(device):
    x = torch.ones(2, 3, device=device, requires_grad=True)
    out = straight_through(x, torch.zeros(2, 3, device=device), torch.tensor([0, -1], device=device))
    (out.decoded.sum() + out.x_loss).backward()
    assert x.grad[0].all()
    assert not x.grad[1].any()


@pytest.mark.float64
def test_vector_quantize_mask_forward_mode_equals_reverse_mode(device):
    x, codebook = (vectors(k, 3, device, torch.float64).requires_grad_() for k in (6, 4))
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    tangents = torch.randn_like(x), torch.randn_like(codebook)
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(t.detach(), tangent) for t, tangent in zip((x, codebook), tangents, strict=True))
        out = vector_quantize(*duals, mask=mask)
        found = [forward_ad.unpack_dual(out[i]).tangent for i in (0, 2, 3)]
    out = vector_quantize(x, codebook, mask=mask)
    for tangent, result in zip(found, (out.quantized, out.codebook_loss, out.commitment_loss), strict=True):
        weight = torch.randn_like(result)
        grads = torch.autograd.grad(result, (x, codebook), weight, allow_unused=True, retain_graph=True)
        products = (0 if g is None else (g * t).sum() for g, t in zip(grads, tangents, strict=True))
        torch.testing.assert_close((tangent * weight).sum(), sum(products))


def test_vector_quantize_mask_passes_opcheck(device):
    x, codebook, mask = vectors(20, 6, device), vectors(5, 6, device), flags(20, device=device)
    torch.library.opcheck(torch.ops.dlvae.vector_quantize_fwd, (x, codebook, True, "float32", mask))
    _, indices, *_, error = torch.ops.dlvae.vector_quantize_fwd(x, codebook, True, "float32", mask)
    one = torch.ones((), device=device)
    torch.library.opcheck(torch.ops.dlvae.vector_quantize_bwd, (x, one, one, error, indices, 5, 1, True, True))


def test_vector_quantize_bad_mask_raises():
    x, codebook = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    for bad in (torch.ones(2, 3), torch.ones(2, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"expected mask of shape \(2, 3\) and dtype torch.bool, got"):
            vector_quantize(x, codebook, mask=bad)

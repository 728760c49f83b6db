from __future__ import annotations

import pytest
import torch

from dlvae_kernels import rotation_trick, vector_quantize
from dlvae_kernels.testing import assert_accurate

from .cases import DTYPES, HALVES, INTERPRETED, layouts, vectors

OPS = ("rotation_trick_bwd", "vector_quantize_fwd", "vector_quantize_bwd")
# (N, D): empty, single, around the vectors of every instruction set and the tiles of a GPU.
SIZES = ((0, 4), (1, 1), (9, 2), (33, 7), (70, 33), (130, 64), (5, 300))


def direction(s):
    """s / |s|; 0 where the norm is rounding error."""
    return torch.where(s.norm(dim=-1, keepdim=True) < 1e-6, 0, torch.nn.functional.normalize(s, dim=-1))


def matrix_formula(grad, x, q):
    """|q| / |x| R^T grad with the matrix R of each vector, in float64."""
    x, q, grad = x.double(), q.double(), grad.double()
    x_norm, q_norm = x.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    e, t = x / x_norm.clamp(min=1e-6), q / q_norm.clamp(min=1e-6)
    s = direction(e + t)
    identity = torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
    rotation = identity - 2 * s[..., :, None] * s[..., None, :] + 2 * t[..., :, None] * e[..., None, :]
    return q_norm / x_norm.clamp(min=1e-6) * (rotation.mT @ grad[..., None])[..., 0]


def vector_formula(grad, x, q):
    """The same in the dtype of the inputs, at least float32, as vector-quantize-pytorch computes it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, q, grad = x.to(dtype), q.to(dtype), grad.to(dtype)
    scale = q.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    e, t = (v / v.norm(dim=-1, keepdim=True).clamp(min=1e-6) for v in (x, q))
    s = direction(e + t)
    along_s, along_t = (grad * s).sum(-1, keepdim=True), (grad * t).sum(-1, keepdim=True)
    return scale * (grad - 2 * along_s * s + 2 * along_t * e)


def gradient(x, q, grad):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(rotation_trick(x, q), x, grad)[0]


def assert_like_float64(x, q):
    grad = torch.randn(q.shape, device=q.device).to(q.dtype)
    found, exact = gradient(x, q, grad), matrix_formula(grad, x, q)
    assert found.dtype == x.dtype
    assert_accurate(found, exact, vector_formula(grad, x, q).to(x.dtype), floor=4e-3 if x.dtype in HALVES else 2e-6)


@pytest.mark.small
@pytest.mark.every_isa
def test_rotation_trick_right_angle_by_hand(device):
    x = torch.tensor([[2.0, 0.0, 0.0]], device=device, requires_grad=True)
    q = torch.tensor([[0.0, 4.0, 0.0]], device=device, requires_grad=True)
    out = rotation_trick(x, q)
    assert torch.equal(out, q)
    # The rotation takes the first axis to the second, and the second to minus the first.
    grad_x, grad_q = torch.autograd.grad(out, (x, q), torch.tensor([[3.0, 5.0, 7.0]], device=device), allow_unused=True)
    torch.testing.assert_close(grad_x, torch.tensor([[10.0, -6.0, 14.0]], device=device))
    assert grad_q is None


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rotation_trick_any_size_and_dtype_equals_float64(device, size, dtype):
    assert_like_float64(vectors(*size, device, dtype), vectors(*size, device, dtype))


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", HALVES)
def test_rotation_trick_half_precision_beside_float32_equals_float64(device, dtype):
    assert_like_float64(vectors(20, 12, device, dtype), vectors(20, 12, device))


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", layouts(2, 2, torch.device("cpu")))
def test_rotation_trick_any_strides_equal_float64(device, layout):
    x = layouts(6, 12, device)[layout]
    q = torch.randn(12, *x.shape[:-1], device=device).movedim(0, -1)
    assert_like_float64(x, q)
    x = x.detach().requires_grad_()
    out = rotation_trick(x, q)
    assert torch.equal(out, q)
    # The gradient of a sum is expanded.
    out.sum().backward()
    assert_accurate(
        x.grad, matrix_formula(torch.ones_like(q), x.detach(), q), vector_formula(torch.ones_like(q), x.detach(), q)
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("d", [1, 5, 64])
def test_rotation_trick_special_vectors_are_finite(device, d):
    x = torch.randn(7, d, device=device)
    q = torch.randn(7, d, device=device)
    x[0] = q[1] = x[2] = q[2] = 0
    q[3], q[4], x[5], q[6] = -x[3], x[4], x[5] * 1e-9, q[6] * 1e-9
    grad = torch.randn(7, d, device=device)
    found = gradient(x, q, grad)
    exact = matrix_formula(grad, x, q)
    for each, expected in zip(found, exact, strict=True):
        assert_accurate(each, expected, expected, floor=2e-5)
    assert not found[1:3].any()
    torch.testing.assert_close(found[4], grad[4], rtol=1e-5, atol=1e-5)
    # For q = -x, the gradient is reflected.
    torch.testing.assert_close(found[3].norm(), grad[3].norm())


@pytest.mark.every_isa
def test_rotation_trick_nan_stays_in_its_vector(device):
    x, q, grad = (torch.randn(40, 20, device=device) for _ in range(3))
    expected = gradient(x, q, grad)
    x[3, 2] = torch.nan
    found = gradient(x, q, grad)
    assert found[3].isnan().all()
    assert torch.equal(found[4:], expected[4:])


def test_rotation_trick_repeated_call_is_bitwise_reproducible(device):
    x, q, grad = (torch.randn(100 if INTERPRETED else 3000, 40, device=device) for _ in range(3))
    assert torch.equal(gradient(x, q, grad), gradient(x, q, grad))


def test_rotation_trick_rotates_x_to_q(device):
    """The transpose of the gradient, applied to x, is q."""
    x, q = torch.randn(2, 6, 5, device=device)
    columns = torch.stack([gradient(x, q, torch.eye(5, device=device)[i].expand(6, 5)) for i in range(5)], dim=1)
    torch.testing.assert_close((columns @ x[..., None])[..., 0], q)


@pytest.mark.float64
def test_rotation_trick_gradient_is_that_of_a_constant_rotation(device):
    x, q = torch.randn(2, 6, 5, device=device, dtype=torch.float64)
    matrix = torch.stack([matrix_formula(torch.eye(5, device=device)[i].expand(6, 5), x, q) for i in range(5)], dim=1)
    x.requires_grad_()
    grad = torch.randn_like(q)
    (expected,) = torch.autograd.grad((matrix @ x[..., None])[..., 0], x, grad)
    torch.testing.assert_close(gradient(x, q, grad), expected)


def test_rotation_trick_output_changed_in_place_keeps_q(device):
    x, q = torch.randn(2, 6, 5, device=device)
    before = q.clone()
    for each in (x, x.detach().requires_grad_()):
        rotation_trick(each, q).zero_()
        assert torch.equal(q, before)


def test_rotation_trick_opcheck_and_compile_pass(device):
    x, q, grad = (torch.randn(3, 4, 5, device=device).transpose(0, 1) for _ in range(3))
    torch.library.opcheck(torch.ops.dlvae.rotation_trick_bwd, (grad, x, q))
    compiled = torch.compile(rotation_trick, fullgraph=True, backend="aot_eager")
    leaf = x.detach().requires_grad_()
    out = compiled(leaf, q)
    assert torch.equal(out, q)
    assert torch.equal(torch.autograd.grad(out, leaf, grad)[0], gradient(x, q, grad))


def test_rotation_trick_exported_gradient_equals_eager():
    class Module(torch.nn.Module):
        def forward(self, x, q):
            return rotation_trick(x, q)

    x, q, grad = torch.randn(3, 6, 5)
    leaf = x.detach().requires_grad_()
    out = torch.export.export(Module(), (leaf, q)).module()(leaf, q)
    assert torch.equal(out, q)
    torch.testing.assert_close(torch.autograd.grad(out, leaf, grad)[0], gradient(x, q, grad))


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_quantize_rotation_is_the_rotation_trick_beside_the_losses(device, dtype):
    x, codebook = vectors(40, 8, device, dtype).requires_grad_(), vectors(7, 8, device, dtype).requires_grad_()
    grad = torch.randn_like(x)
    out, straight = (vector_quantize(x, codebook, gradient=each) for each in ("rotation", "straight_through"))
    for value, expected in zip(out, straight, strict=True):
        assert torch.equal(value, expected)
    loss = (out.quantized * grad).sum() + out.codebook_loss + out.commitment_loss
    grad_x, grad_codebook = torch.autograd.grad(loss, (x, codebook))
    expected_x, expected_codebook = torch.autograd.grad(
        straight.codebook_loss + straight.commitment_loss, (x, codebook)
    )
    rotated = gradient(x, out.quantized.detach(), grad)
    torch.testing.assert_close(grad_x, expected_x + rotated)
    assert torch.equal(grad_codebook, expected_codebook)
    assert torch.equal(vector_quantize(x.detach(), codebook.detach(), gradient="rotation").quantized, out.quantized)


def test_vector_quantize_unknown_gradient_raises():
    with pytest.raises(ValueError, match="expected gradient to be one of 'straight_through', 'rotation', got 'none'"):
        vector_quantize(torch.ones(2, 3), torch.ones(1, 3), gradient="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(2, 4)}, r"expected x and q of one shape \[..., D\] with D >= 1, got \(2, 3\) and \(2, 4\)"),
        ({"q": torch.ones(2, 3).double()}, r"expected q of dtype torch.float32, .*, got torch.float64"),
        ({"q": torch.ones(2, 3).long()}, r"expected q of dtype float16, .*, got torch.int64"),
        ({"q": torch.ones(2, 3, device="meta")}, r"expected q on the device of x, cpu, got meta"),
        ({"x": torch.ones(2, 0), "q": torch.ones(2, 0)}, r"with D >= 1, got \(2, 0\) and \(2, 0\)"),
    ],
)
def test_rotation_trick_bad_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        rotation_trick(**{"x": torch.ones(2, 3), "q": torch.ones(2, 3), **changes})

"""Codebooks [H, K, D] of several heads: each operation equals a loop over the heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlvae_kernels import ema_update, gather_codes, nearest_code, one_hot, topk_codes, vector_quantize
from dlvae_kernels.functional import ema_statistics, ema_step
from dlvae_kernels.testing import assert_accurate, assert_same_codes

from .cases import DTYPES

OPS = (
    *("nearest_code", "gather_codes_fwd", "gather_codes_bwd", "vector_quantize_fwd", "vector_quantize_bwd"),
    *("ema_statistics", "ema_step"),
)
# (vectors of each head, heads, K, D): empty, few, one head, one code, several blocks.
SIZES = ((0, 3, 5, 4), (1, 2, 3, 7), (5, 1, 9, 3), (70, 4, 1, 8), (200, 3, 65, 16), (33, 8, 100, 5))


def heads_of(n: int, h: int, d: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, h, d, device=device).to(dtype)


def layouts(device: torch.device) -> dict[str, Tensor]:
    """Vectors [..., 3, 8] of three heads in several kinds of strides."""
    channel_first = torch.randn(2, 24, 7, 5, device=device)
    return {
        "contiguous": torch.randn(2, 35, 3, 8, device=device),
        "channel_first": channel_first.flatten(2).transpose(1, 2).unflatten(-1, (3, 8)),
        "head_first": torch.randn(3, 70, 8, device=device).transpose(0, 1),
        "sliced": torch.randn(70, 6, 16, device=device)[:, ::2, ::2],
        "expanded": torch.randn(70, 1, 8, device=device).expand(70, 3, 8),
        "single": torch.randn(3, 8, device=device),
    }


@pytest.mark.small
@pytest.mark.every_isa
def test_heads_two_codebooks_by_hand(device):
    codebook = torch.tensor([[[0.0], [4.0]], [[1.0], [9.0]]], device=device, requires_grad=True)
    x = torch.tensor([[[1.0], [8.0]], [[3.0], [2.0]]], device=device, requires_grad=True)
    out = vector_quantize(x, codebook)
    assert out.quantized.tolist() == [[[0], [9]], [[4], [1]]]
    assert out.indices.tolist() == nearest_code(x, codebook).tolist() == [[0, 1], [1, 0]]
    assert out.counts.tolist() == [[1, 1], [1, 1]]
    assert out.codebook_loss.item() == out.commitment_loss.item() == 1
    (out.codebook_loss + 2 * out.commitment_loss).backward()
    assert codebook.grad.tolist() == [[[-0.5], [0.5]], [[-0.5], [0.5]]]
    assert x.grad.flatten().tolist() == [1, -1, -1, 1]
    assert gather_codes(codebook, out.indices).tolist() == out.quantized.tolist()
    statistics = ema_statistics(x, out.indices, 2, num_heads=2)
    assert statistics.tolist() == [[[1, 1], [3, 1]], [[2, 1], [8, 1]]]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_searches_with_heads_equal_float64_of_each_head(device, size, dtype):
    n, h, k, d = size
    x, codebook = heads_of(n, h, d, device, dtype), heads_of(h, k, d, device, dtype)
    indices, distances = nearest_code(x, codebook, return_distance=True)
    out = vector_quantize(x, codebook)
    assert torch.equal(out.indices, indices)
    assert indices.shape == distances.shape == (n, h)
    for head in range(h):
        assert_same_codes(indices[:, head], x[:, head], codebook[head])
        alone = vector_quantize(x[:, head], codebook[head])
        assert torch.equal(alone.indices, indices[:, head])
        assert torch.equal(alone.quantized, out.quantized[:, head])
        assert torch.equal(alone.counts, out.counts[head])
        exact = (x[:, head].double() - codebook[head].double()[indices[:, head]]).square().sum(-1)
        torch.testing.assert_close(distances[:, head].double(), exact, rtol=1e-4, atol=1e-5)
    exact = (x.double() - gather_codes(codebook, indices).double()).square().sum() / max(1, x.numel())
    torch.testing.assert_close(out.codebook_loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", layouts(torch.device("cpu")))
def test_operations_with_heads_any_strides_equal_contiguous(device, layout):
    x = layouts(device)[layout].requires_grad_()
    codebook = heads_of(24, 6, 3, device)[::2, ::2].permute(1, 0, 2)[:, :, :1].expand(3, 12, 8)
    codebook = codebook + torch.randn(8, 12, 3, device=device).permute(2, 1, 0)
    copy = x.detach().contiguous().requires_grad_()
    out, expected = vector_quantize(x, codebook), vector_quantize(copy, codebook.contiguous())
    for name in out._fields:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-6, atol=0)
    if layout != "expanded":
        assert out.quantized.stride() == torch.empty_like(x).stride()
    for each in (out, expected):
        (each.quantized.sum() + each.commitment_loss).backward()
    torch.testing.assert_close(x.grad, copy.grad, rtol=1e-6, atol=1e-7)
    assert torch.equal(gather_codes(codebook, out.indices), gather_codes(codebook.contiguous(), out.indices))
    statistics = [ema_statistics(each, out.indices, 12, num_heads=3) for each in (x, copy)]
    torch.testing.assert_close(*statistics, rtol=1e-6, atol=1e-6)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_and_statistics_with_heads_equal_float64_of_each_head(device, size, dtype):
    n, h, k, d = size
    x, codebook = heads_of(n, h, d, device, dtype), heads_of(h, k, d, device, dtype).requires_grad_()
    indices = torch.randint(0, k, (n, h), device=device)
    grad = heads_of(n, h, d, device, dtype)
    gather_codes(codebook, indices).backward(grad)
    statistics = ema_statistics(x, indices, k, num_heads=h)
    assert statistics.shape == (h, k, d + 1)
    for head in range(h):
        for actual, vectors in ((codebook.grad[head], grad[:, head]), (statistics[head, :, :-1], x[:, head])):
            exact, expression = (
                torch.zeros(k, d, dtype=to, device=device).index_add(0, indices[:, head], vectors.to(to))
                for to in (torch.float64, actual.dtype)
            )
            assert_accurate(actual, exact, expression, floor=1e-6 if actual.dtype.itemsize > 2 else 4e-3)
        assert torch.equal(statistics[head, :, -1], torch.bincount(indices[:, head], minlength=k).to(statistics.dtype))


@pytest.mark.every_isa
@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
def test_ema_update_with_heads_equals_each_head(device, epsilon):
    x, codebook = heads_of(60, 3, 5, device), heads_of(3, 7, 5, device)
    indices = torch.randint(-1, 6, (60, 3), device=device)
    state = codebook, torch.rand(3, 7, device=device), heads_of(3, 7, 5, device)
    expected = [each.clone() for each in state]
    ema_update(*state, x, indices, decay=0.7, epsilon=epsilon)
    for head in range(3):
        ema_update(*(each[head] for each in expected), x[:, head], indices[:, head], decay=0.7, epsilon=epsilon)
    for actual, each in zip(state, expected, strict=True):
        torch.testing.assert_close(actual, each, rtol=1e-5, atol=1e-6)
    assert torch.equal(state[0][:, 6], expected[0][:, 6])


@pytest.mark.every_isa
def test_nearest_code_with_heads_rules_for_nan_and_ties_hold_in_each_head(device):
    x, codebook = heads_of(40, 3, 4, device), heads_of(3, 20, 4, device)
    codebook[1, :] = torch.nan
    codebook[0, 3] = torch.nan
    codebook[2, 11] = codebook[2, 2]
    x[5, 0, 1] = torch.nan
    x[6, 2] = codebook[2, 2]
    indices = nearest_code(x, codebook)
    assert indices[5, 0] == 0
    assert indices[6, 2] == 2
    assert not indices[:, 1].any()
    assert not (indices[:, 0] == 3).any()
    assert not (indices[:, 2] == 11).any()


@pytest.mark.every_isa
def test_operations_with_heads_repeated_call_is_bitwise_reproducible(device):
    x, codebook = heads_of(300, 4, 9, device), heads_of(4, 30, 9, device).requires_grad_()
    results = []
    for _ in range(2):
        out = vector_quantize(x, codebook)
        (grad,) = torch.autograd.grad(out.codebook_loss, codebook)
        results.append((*out[:1], out.codebook_loss, grad, ema_statistics(x, out.indices, 30, num_heads=4)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.float64
def test_operations_with_heads_pass_gradcheck(device):
    x = heads_of(4, 2, 3, device, torch.float64).requires_grad_()
    codebook = heads_of(2, 5, 3, device, torch.float64).requires_grad_()
    indices = torch.tensor([[0, 4], [-1, 2], [3, -1]], device=device)
    assert torch.autograd.gradcheck(lambda codes: gather_codes(codes, indices), codebook, check_forward_ad=True)
    # The quantized vectors have the gradient of x by definition, and each loss that of one side alone.
    assigned = nearest_code(x, codebook)
    out = vector_quantize(x, codebook)
    codes = torch.stack([codebook[h][assigned[:, h]] for h in range(2)], 1)
    expected = (codes - x.detach()).square().mean() + (codes.detach() - x).square().mean()
    actual = torch.autograd.grad(out.codebook_loss + out.commitment_loss, (x, codebook))
    for found, exact in zip(actual, torch.autograd.grad(expected, (x, codebook)), strict=True):
        torch.testing.assert_close(found, exact)


def test_operations_with_heads_pass_opcheck(device):
    x, codebook = heads_of(6, 3, 4, device), heads_of(3, 5, 4, device)
    ops = torch.ops.dlvae
    torch.library.opcheck(ops.nearest_code, (x, codebook, True, "float32"))
    torch.library.opcheck(ops.vector_quantize_fwd, (x, codebook, True, "float32", None))
    _, indices, *_, error = ops.vector_quantize_fwd(x, codebook, True, "float32", None)
    one = torch.ones((), device=device)
    torch.library.opcheck(ops.vector_quantize_bwd, (x, one, one, error, indices, 5, 3, True, True))
    torch.library.opcheck(ops.gather_codes_fwd, (codebook, indices))
    torch.library.opcheck(ops.gather_codes_bwd, (x, indices, 5, 3))
    torch.library.opcheck(ops.ema_statistics, (x, indices, 5, 3))
    state = codebook.clone(), torch.rand(3, 5, device=device), codebook.clone()
    torch.library.opcheck(ops.ema_step, (*state, ema_statistics(x, indices, 5, num_heads=3), 0.9, 1e-5))


def test_operations_with_heads_compiled_whole_match_eager(device):
    x, codebook = heads_of(20, 3, 4, device).requires_grad_(), heads_of(3, 5, 4, device).requires_grad_()
    mask = torch.rand(20, device=device) > 0.3

    def function(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        out = vector_quantize(x, codebook, mask=mask)
        again = gather_codes(codebook, out.indices)
        return *out, again, ema_statistics(x, out.indices, 5, num_heads=3)

    expected, out = function(x, codebook), torch.compile(function, fullgraph=True, backend="aot_eager")(x, codebook)
    for actual, each in zip(out, expected, strict=True):
        torch.testing.assert_close(actual, each, rtol=0, atol=0)
    grads = [torch.autograd.grad(each[2] + each[3] + each[5].sum(), (x, codebook)) for each in (out, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_operations_with_heads_invalid_inputs_raise():
    x, codebook, indices = torch.zeros(5, 3, 4), torch.zeros(3, 7, 4), torch.zeros(5, 3, dtype=torch.int64)
    expected = r"expected x of shape \[..., 3, 4\], with the H and D of codebook \[H, K, D\], got "
    for function in (nearest_code, vector_quantize):
        for bad in (x[:, :2], x[..., :2], x[0, 0]):
            with pytest.raises(ValueError, match=expected):
                function(bad, codebook)
        with pytest.raises(ValueError, match=r"expected codebook of shape \[K, D\] or \[H, K, D\] with H >= 1, .* got"):
            function(x, codebook[None])
        with pytest.raises(ValueError, match=r"expected codebook of shape \[K, D\] or .*, got \(0, 7, 4\)"):
            function(x[:, :0], codebook[:0])
    with pytest.raises(ValueError, match=r"expected dictionary of shape \[K, D\] .*this operation takes no heads"):
        topk_codes(x, codebook, 2)
    with pytest.raises(
        ValueError, match=r"expected indices of shape \[..., 3\], with the H of codebook .*got \(5, 2\)"
    ):
        gather_codes(codebook, indices[:, :2])
    with pytest.raises(ValueError, match=r"expected x of shape \[..., 2, D\] for num_heads=2, got \(5, 3, 4\)"):
        ema_statistics(x, indices, 7, num_heads=2)
    with pytest.raises(ValueError, match="expected num_heads to be an integer of at least 1, got 0"):
        ema_statistics(x, indices, 7, num_heads=0)
    state = codebook, torch.zeros(3, 7), codebook.clone()
    with pytest.raises(ValueError, match=r"expected statistics of shape \[H, K, D \+ 1\] = \(3, 7, 5\), got \(21, 5\)"):
        ema_step(*state, torch.zeros(21, 5), decay=0.9, epsilon=0)
    with pytest.raises(ValueError, match=r"expected cluster_size of shape \(3, 7\)"):
        ema_step(codebook, torch.zeros(7), codebook.clone(), torch.zeros(3, 7, 5), decay=0.9, epsilon=0)
    with pytest.raises(ValueError, match=expected):
        ema_update(*state, x[:, :2], indices[:, :2], decay=0.9, epsilon=0)
    with pytest.raises(ValueError, match=r"expected indices of shape \[N\] or \[N, k\]"):
        one_hot(indices[None], 7)

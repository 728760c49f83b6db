"""Searches and losses at the ends of the number ranges: infinities, float64 from 1e-300 to 1e300, float16 overflow."""

from __future__ import annotations

import pytest
import torch

from dlvae_kernels import nearest_code, topk_codes, use_backend, vector_quantize

OPS = ("nearest_code", "topk_codes", "vector_quantize_fwd", "vector_quantize_bwd")
INF, NAN = float("inf"), float("nan")


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([[-1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], 0),
        ([[NAN, 0.0], [2.0, 0.0], [-3.0, 0.0]], 1),
        ([[INF, 0.0], [2.0, 0.0], [-INF, 0.0]], 0),
        ([[NAN, 0.0], [0.0, -INF], [2.0, 0.0]], 1),
        ([[NAN, 0.0], [NAN, NAN], [2.0, NAN]], 0),
    ],
)
def test_nearest_code_vector_with_infinity_is_the_first_code_without_nan(device, dtype, codes, expected):
    codebook = torch.tensor(codes, device=device, dtype=dtype)
    x = torch.tensor([[INF, 0.0], [-INF, 1.0], [INF, -INF], [0.5, INF]], device=device, dtype=dtype)
    assert nearest_code(x, codebook).tolist() == [expected] * 4
    assert vector_quantize(x, codebook).indices.tolist() == [expected] * 4
    # Also beyond the few vectors that small batches are.
    assert nearest_code(x.repeat(40, 1), codebook).tolist() == [expected] * 160


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_codes_vector_with_infinity_orders_by_index(device, dtype):
    codebook = torch.tensor([[NAN, 0.0], [-1.0, 0.0], [2.0, 0.0], [INF, 1.0], [1.0, 1.0]], device=device, dtype=dtype)
    x = torch.tensor([[INF, 0.0], [-INF, 1.0]], device=device, dtype=dtype)
    for metric in ("l2", "dot"):
        assert topk_codes(x, codebook, 5, metric=metric)[0].tolist() == [[1, 2, 3, 4, 0]] * 2


# Powers of two scale exactly: indices do not change, and values do by that power.
@pytest.mark.parametrize("exponent", [-1000, -900, -530, -300, 0, 300, 505, 900])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_searches_float64_do_not_depend_on_the_scale(exponent, metric):
    x, codebook, bias = torch.randn(40, 6).double(), torch.randn(30, 6).double(), torch.randn(30).double()
    codebook[20:] = codebook[:10]
    unit = 2.0**exponent
    with use_backend("reference"):
        indices, distances = nearest_code(x, codebook, return_distance=True)
        found, scaled = nearest_code(x * unit, codebook * unit, return_distance=True)
        kept, values = topk_codes(x, codebook, 12, metric=metric)
        kept_scaled, values_scaled = topk_codes(x * unit, codebook * unit, 12, metric=metric)
        with_bias, _ = topk_codes(x, codebook, 12, metric="dot", bias=bias)
        with_bias_scaled, _ = topk_codes(x * unit, codebook, 12, metric="dot", bias=bias * unit)
    assert torch.equal(found, indices)
    assert torch.equal(kept_scaled, kept)
    assert torch.equal(with_bias_scaled, with_bias)
    assert torch.equal(scaled, distances * unit * unit)
    assert torch.equal(values_scaled, values * unit * unit)


def test_searches_float64_duplicates_give_the_lowest_index_at_any_scale():
    codebook = torch.randn(4, 5).double().repeat(3, 1)
    for exponent in (-1060, -1022, -530, 0, 500, 1000):
        scaled = codebook * 2.0**exponent
        with use_backend("reference"):
            assert nearest_code(scaled, scaled).tolist() == [0, 1, 2, 3] * 3
            assert topk_codes(scaled, scaled, 3)[0].tolist() == [[i, i + 4, i + 8] for i in range(4)] * 3


def test_searches_float64_distances_match_differences():
    x = torch.randn(50, 8).double()
    codebook = x[torch.randperm(50)] + 1e-9 * torch.randn(50, 8).double()
    with use_backend("reference"):
        indices, distances = nearest_code(x, codebook, return_distance=True)
        kept, values = topk_codes(x, codebook, 4)
    torch.testing.assert_close(distances, (x - codebook[indices]).square().sum(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(values, (x[:, None] - codebook[kept]).square().sum(2), rtol=1e-14, atol=0)


def test_nearest_code_vector_far_beyond_all_codes_gives_the_first():
    x = torch.tensor([[1e300, 1.0], [1e-300, 0.0], [0.0, 1e200]], dtype=torch.float64)
    codebook = torch.tensor([[2e-300, 0.0], [1e-300, 0.0], [-1e-300, 1e-310]], dtype=torch.float64)
    with use_backend("reference"):
        assert nearest_code(x, codebook).tolist() == [0, 1, 0]


@pytest.mark.every_isa
def test_vector_quantize_gradient_of_errors_beyond_float16_is_finite(device):
    x = torch.full((64, 64), 6e4, dtype=torch.float16, device=device, requires_grad=True)
    codebook = torch.full((2, 64), -6e4, device=device, requires_grad=True)
    out = vector_quantize(x, codebook)
    (out.commitment_loss + out.codebook_loss).backward()
    # 2 / 64^2 times the difference of the two, each as float16 has it.
    exact = 2 / 64**2 * (float(x.detach()[0, 0]) + 6e4)
    torch.testing.assert_close(x.grad.float(), torch.full_like(x.grad, exact).float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(codebook.grad[0], torch.full_like(codebook[0], -64 * exact), rtol=1e-3, atol=0)


@pytest.mark.every_isa
def test_vector_quantize_loss_near_the_largest_float32_is_finite(device):
    x = torch.full((70, 300), 3e18, device=device)
    out = vector_quantize(x, torch.zeros(3, 300, device=device))
    for loss in (out.codebook_loss, out.commitment_loss):
        assert float(loss) == pytest.approx(9e36, rel=1e-5)

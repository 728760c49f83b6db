from __future__ import annotations

import pytest
import torch

from dlvae_kernels import ema_update
from dlvae_kernels.functional import ema_statistics
from dlvae_kernels.testing import assert_accurate

from .cases import DTYPES, INTERPRETED, layouts, vectors

OPS = ("ema_statistics", "ema_step")


def state(k, d, device, dtype=torch.float32):
    codebook = vectors(k, d, device, dtype)
    return codebook, torch.ones(k, device=device, dtype=dtype), codebook.clone()


@pytest.mark.small
@pytest.mark.every_isa
def test_ema_update_three_codes_by_hand(device):
    codebook = torch.tensor([[0.0], [10.0], [20.0]], device=device)
    cluster_size, embed_sum = torch.tensor([2.0, 1.0, 1.0], device=device), codebook.clone()
    x = torch.tensor([[4.0], [8.0], [12.0]], device=device)
    ema_update(codebook, cluster_size, embed_sum, x, torch.tensor([0, 0, 1], device=device), decay=0.5, epsilon=0.0)
    assert cluster_size.tolist() == [2, 1, 0.5]
    assert embed_sum.tolist() == [[6], [11], [10]]
    assert codebook.tolist() == [[3], [11], [20]]


@pytest.mark.small
@pytest.mark.every_isa
def test_ema_update_epsilon_by_hand(device):
    codebook, cluster_size, embed_sum = state(2, 1, device)
    cluster_size.copy_(torch.tensor([3.0, 1.0]))
    embed_sum.copy_(torch.tensor([[6.0], [5.0]]))
    x = torch.tensor([[2.0], [5.0]], device=device)
    ema_update(codebook, cluster_size, embed_sum, x, torch.tensor([0, 1], device=device), decay=1.0, epsilon=1.0)
    # Sizes 3 and 1 become (3 + 1) and (1 + 1), scaled by 4 / 6 to keep their sum.
    torch.testing.assert_close(codebook, torch.tensor([[6 / (16 / 6)], [5 / (8 / 6)]], device=device))


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(0, 5, 4), (1, 1, 1), (507, 129, 64), (3000, 3, 7), (300, 1100, 5)])
def test_ema_statistics_any_dtype_equals_float64(device, size, dtype):
    n, k, d = size
    x, indices = vectors(n, d, device, dtype), torch.randint(0, k, (n,), device=device)
    statistics = ema_statistics(x, indices, k)
    assert statistics.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(statistics[:, -1].long(), torch.bincount(indices, minlength=k))
    exact = torch.zeros(k, d, dtype=torch.float64, device=device).index_add_(0, indices, x.double())
    expression = torch.zeros(k, d, dtype=statistics.dtype, device=device).index_add_(0, indices, x.to(statistics.dtype))
    assert_accurate(statistics[:, :-1], exact, expression)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", layouts(2, 2, torch.device("cpu")))
def test_ema_statistics_any_strides_equals_contiguous(device, layout):
    x = layouts(50, 12, device)[layout]
    indices = torch.randint(0, 9, x.shape[:-1], device=device)
    expected = ema_statistics(x.reshape(-1, 12).contiguous(), indices.flatten(), 9)
    assert torch.equal(ema_statistics(x, indices, 9), expected)


@pytest.mark.float64
def test_ema_update_many_steps_matches_float64(device):
    states = [state(17, 5, device), None]
    states[1] = [tensor.double() for tensor in states[0]]
    for step in range(50):
        x = vectors(100, 5, device) + 0.1 * step
        indices = torch.randint(0, 12, (100,), device=device)
        for each, batch in zip(states, (x, x.double()), strict=True):
            ema_update(*each, batch, indices, decay=0.9, epsilon=1e-5)
    for actual, exact in zip(*states, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)


def test_ema_update_decay_of_zero_or_one_keeps_the_batch_or_the_past(device):
    x, indices = vectors(30, 4, device), torch.arange(30, device=device) % 3
    codebook, *rest = state(3, 4, device)
    ema_update(codebook, *rest, x, indices, decay=0.0, epsilon=0.0)
    torch.testing.assert_close(codebook, torch.stack([x[i::3].mean(0) for i in range(3)]))
    before = codebook.clone()
    ema_update(codebook, *rest, x + 1, indices, decay=1.0, epsilon=0.0)
    torch.testing.assert_close(codebook, before)


def test_ema_update_dead_codes_keep_their_place(device):
    codebook, *rest = state(2, 2, device)
    codebook[1] = rest[1][1] = 50.0
    for _ in range(20 if INTERPRETED else 200):
        x = codebook[:1] + 0.1
        ema_update(codebook, *rest, x, torch.zeros(1, dtype=torch.int64, device=device), decay=0.8, epsilon=1e-5)
    assert codebook[1].tolist() == [50, 50]
    assert torch.isfinite(codebook).all()


@pytest.mark.every_isa
@pytest.mark.parametrize("num_codes", [5, 2000])
def test_ema_statistics_vectors_that_are_not_finite_are_left_out(device, num_codes):
    x, indices = vectors(60, 4, device), torch.arange(60, device=device) % 3
    expected = ema_statistics(x[3:], indices[3:], num_codes)
    x[0, 1], x[1, 0], x[2, 3] = float("nan"), float("inf"), float("-inf")
    assert torch.equal(ema_statistics(x, indices, num_codes), expected)
    assert not ema_statistics(x[:3], indices[:3], num_codes).any()


def test_ema_update_counts_of_zero_keep_the_codebook(device):
    codebook, cluster_size, embed_sum = state(2, 2, device)
    cluster_size.zero_()
    before = codebook.clone()
    ema_update(codebook, cluster_size, embed_sum, codebook + 1, torch.arange(2, device=device), decay=1.0, epsilon=1e-5)
    assert torch.equal(codebook, before)


@pytest.mark.every_isa
@pytest.mark.large
def test_ema_statistics_repeated_call_is_bitwise_reproducible(device):
    torch.use_deterministic_algorithms(False)
    x, indices = vectors(5000, 16, device), torch.randint(0, 7, (5000,), device=device)
    assert torch.equal(ema_statistics(x, indices, 7), ema_statistics(x, indices, 7))


def test_ema_update_opcheck_and_compile_pass(device):
    x, indices = vectors(10, 3, device), torch.arange(10, device=device) % 4
    statistics = ema_statistics(x, indices, 5)
    torch.library.opcheck(torch.ops.dlvae.ema_statistics, (x, indices, 5, 1))
    torch.library.opcheck(torch.ops.dlvae.ema_step, (*state(5, 3, device), statistics, 0.9, 1e-5))
    eager, traced = state(5, 3, device), None
    traced = [tensor.clone() for tensor in eager]
    ema_update(*eager, x, indices, decay=0.9, epsilon=1e-5)
    torch.compile(ema_update, fullgraph=True, backend="aot_eager")(*traced, x, indices, decay=0.9, epsilon=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": -0.1}, r"expected decay to lie in \[0, 1\], got -0.1"),
        ({"decay": float("nan")}, r"expected decay to lie in \[0, 1\], got nan"),
        ({"epsilon": -1.0}, r"expected epsilon to be at least 0, got -1.0"),
        ({"codebook": torch.ones(3, 2).half()}, r"expected codebook of dtype float32 or float64, .* torch.float16"),
        ({"cluster_size": torch.ones(4)}, r"expected cluster_size of shape \(3,\) .*, got \(4,\)"),
        ({"embed_sum": torch.ones(3, 2).double()}, r"expected embed_sum .*dtype torch.float32, .* torch.float64"),
        ({"x": torch.ones(4, 3)}, r"expected x of shape \[..., 2\], .*, got \(4, 3\)"),
        ({"indices": torch.zeros(5, dtype=torch.int64)}, r"expected indices of shape \(4,\), one for .* x, got \(5,\)"),
        ({"indices": torch.tensor([0, 1, 2, 3])}, r"expected indices in \[-1, 3\) .*, got 3"),
    ],
)
def test_ema_update_bad_input_raises_and_changes_nothing(change, message):
    arguments = {
        "codebook": torch.ones(3, 2),
        "cluster_size": torch.ones(3),
        "embed_sum": torch.ones(3, 2),
        "x": torch.ones(4, 2),
        "indices": torch.tensor([0, 1, 2, 0]),
        "decay": 0.5,
        "epsilon": 1e-5,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ema_update(**arguments)
    assert all((arguments[name] == 1).all() for name in ("codebook", "cluster_size", "embed_sum"))

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss

from dlvae_kernels.functional import straight_through

pytestmark = pytest.mark.small


def formula(x, decoded):
    """The same values and gradients by detached tensors."""
    fixed = decoded.detach()
    straight = fixed + (x - x.detach())
    return straight, mse_loss(decoded, x.detach().to(decoded.dtype)), mse_loss(x.to(decoded.dtype), fixed)


def case(dtype=torch.float32):
    x = torch.randn(3, 4, 5).to(dtype).transpose(0, 1).requires_grad_()
    return x, torch.randn(4, 3, 5, requires_grad=True), torch.zeros(4, 3).long()


@pytest.mark.parametrize("outputs", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_straight_through_any_outputs_gradients_equal_the_formula(outputs, dtype):
    x, decoded, indices = case(dtype)
    found = []
    for out in (straight_through(x, decoded, indices), formula(x, decoded)):
        loss = sum((out[i].float() * (i + 1)).sin().sum() for i in outputs)
        found.append((loss.detach(), *torch.autograd.grad(loss, (x, decoded), allow_unused=True)))
    for actual, expected in zip(*found, strict=True):
        tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        if actual is not None or (expected is not None and expected.any()):
            torch.testing.assert_close(actual, expected, **tolerance)


def test_straight_through_output_changed_in_place_keeps_decoded():
    x, decoded, indices = case()
    before = decoded.detach().clone()
    out = straight_through(x, decoded, indices)
    (out.decoded.relu_().sum() + out.x_loss).backward()
    assert torch.equal(decoded.detach(), before)
    assert x.grad.isfinite().all()


def test_straight_through_loss_near_the_largest_float32_is_finite():
    x = torch.full((70, 300), 3e18)
    out = straight_through(x, torch.zeros(70, 300), torch.zeros(70).long())
    assert float(out.decoded_loss) == float(out.x_loss) == pytest.approx(9e36, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoded": torch.zeros(2, 4)}, r"expected x and decoded of one shape \[..., D\], got \(2, 3\) and \(2, 4\)"),
        ({"decoded": torch.zeros(2, 3).long()}, r"expected decoded of dtype float16, .*, got torch.int64"),
        ({"indices": torch.zeros(3).long()}, r"expected indices of shape \(2,\), one for each vector of x, got \(3,\)"),
        ({"indices": torch.zeros(2)}, r"expected indices of dtype torch.int64, got torch.float32"),
    ],
)
def test_straight_through_bad_input_raises(changes, message):
    arguments = {"x": torch.zeros(2, 3), "decoded": torch.zeros(2, 3), "indices": torch.zeros(2).long(), **changes}
    with pytest.raises(ValueError, match=message):
        straight_through(**arguments)

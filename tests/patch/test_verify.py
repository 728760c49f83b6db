"""`verify` counts the tokens that differ, and float64 decides between both searches."""

from __future__ import annotations

import pytest
import torch

from dlvae_kernels import patch

from . import models


class RoughCodebook(models.EuclideanCodebook):
    """A search in bfloat16 products, which is wrong for some vectors."""

    def quantize(self, x):
        x, codes = x.bfloat16().float(), self.embed.bfloat16().float()
        return torch.cdist(x, codes).argmin(-1) if self.rough else super().quantize(x)

    rough = False


@pytest.fixture
def rough(monkeypatch):
    module = RoughCodebook(512, 8)
    monkeypatch.setattr(module, "rough", False)
    return module


def run(module, x):
    # The class is rough only after it was recognised.
    module.rough = True
    return module.quantize(x)


@pytest.mark.parametrize("as_callable", [True, False])
def test_verify_without_differences_reports_none(as_callable):
    model, x = models.ResidualStack(), torch.randn(2, 8, 50)
    patched = patch(model, verify=(lambda: model(x)) if as_callable else x)
    assert [str(each) for each in patched.comparisons] == [
        "ResidualStack.encode: 0 of 400 tokens differ from the stock search",
        "EuclideanCodebook.quantize: 0 of 400 tokens differ from the stock search",
    ]
    assert all(each.handler.method in vars(each.module) for each in patched.changes)
    assert str(patched).endswith(f"  verified: {patched.comparisons[-1]}")


def test_verify_float64_sides_with_the_exact_search(rough):
    x = torch.randn(2000, 8)
    (comparison,) = patch(rough, verify=lambda: run(rough, x)).comparisons
    expected = (x.double()[:, None] - rough.embed.double()).square().sum(-1).argmin(-1)
    stock = RoughCodebook.quantize(rough, x)
    assert comparison.tokens == 2000
    assert comparison.differing == (stock != expected).sum() > 0
    assert comparison.patched == comparison.differing
    assert comparison.stock == 0
    assert f"float64 agrees with the patched method in {comparison.patched}" in str(comparison)


def test_verify_that_raises_leaves_the_patched_methods(rough):
    def stop():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        patch(rough, verify=stop)
    assert "quantize" not in vars(rough)


@pytest.mark.parametrize(
    ("model", "shape", "method"),
    [
        (models.FactorizedQuantizer, (2, 16, 30), "decode_latents"),
        (lambda: models.ImageQuantizer("taming", True), (2, 8, 5, 6), "forward"),
        (models.DotQuantizer, (2, 8, 5, 6), "forward"),
    ],
)
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_verify_covers_each_search(model, shape, method, form):
    x = torch.randn(shape)
    module = model()
    name = "z" if method == "forward" else "x"
    (comparison,) = patch(module, verify={"tensor": x, "tuple": (x,), "dict": {name: x}}[form]).comparisons
    assert comparison.method == f"{type(module).__name__}.{method}"
    assert comparison[1:] == (60, 0, 0, 0)

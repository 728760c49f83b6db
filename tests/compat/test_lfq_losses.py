"""The losses of LFQ of the compatibility package: float64 formulas, masks, sampling, and memory."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own

from ..allocations import Allocations
from .comparison import check_only_own

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

ALL_TERMS = {"return_loss_breakdown": True}


def entropies(x: Tensor, inv_temperature: float, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The per-sample and batch entropy of vectors [..., d] in float64, with the N x K matrix."""
    log_p = (2 * inv_temperature * x.double().flatten(0, -2) @ codes.double().T).log_softmax(1)
    mean = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(1).mean(), -torch.special.xlogy(mean, mean.clamp(min=1e-300)).sum()


# The most by which vector-quantize-pytorch lowers the entropies of 400 normal vectors of each size.
CLAMPED = {6: 4e-5, 10: 6e-4, 12: 4e-3}


@pytest.mark.parametrize("inv_temperature", [100.0, 10.0, 3.0, 1.0, 0.3])
@pytest.mark.parametrize("d", CLAMPED)
def test_lfq_entropies_match_float64_where_vector_quantize_pytorch_clamps(d, inv_temperature):
    x = torch.randn(4, 100, d, requires_grad=True)
    module = own.LFQ(dim=d)
    expected = entropies(x, inv_temperature, module.codebook)
    _, found = module(x, inv_temperature, **ALL_TERMS)
    with torch.no_grad():
        _, clamped = stock.LFQ(dim=d)(x, inv_temperature, **ALL_TERMS)
    for actual, value, lower in zip(found, expected, clamped, strict=False):
        assert_close(actual.double(), value, rtol=1e-6, atol=2e-6)
        assert value - CLAMPED[d] < lower < value + 2e-6
        grads = [torch.autograd.grad(each, x, retain_graph=True)[0] for each in (actual, value)]
        assert_close(*grads, rtol=1e-4, atol=3e-5 * float(grads[1].abs().max()))


@pytest.mark.parametrize("masked", [False, True])
def test_lfq_losses_match_float64_formula(masked):
    module = own.LFQ(
        codebook_size=32,
        entropy_loss_weight=0.4,
        diversity_gamma=1.7,
        commitment_loss_weight=0.6,
        spherical=True,
        codebook_scale=1.5,
        experimental_softplus_entropy_loss=True,
        entropy_loss_offset=0.5,
    )
    x = torch.randn(3, 8, 5, requires_grad=True)
    mask = torch.rand(3, 8) < 0.6 if masked else None
    (quantized, indices, loss), terms = module(x, 0.8, True, mask)
    z, codes = (normalize(each.double(), dim=-1) * 1.5 for each in (x, module.codebook))
    valid = z if mask is None else z[mask][None]
    per_sample, batch = entropies(valid, 0.8, codes)
    of_valid = codes[indices] if mask is None else codes[indices][mask][None]
    commitment = (valid - of_valid).square().mean()
    expected = 0.4 * softplus(per_sample - 1.7 * batch + 0.5) + 0.6 * commitment
    for actual, value in zip((loss, *terms), (expected, per_sample, batch, commitment), strict=True):
        assert_close(actual.double(), value, rtol=1e-5, atol=1e-6)
    assert_close(quantized.double(), codes[indices], rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(each, x, retain_graph=True)[0] for each in (loss, expected)]
    assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_lfq_mask_of_positions_gives_the_batch_entropy_of_the_mean_distribution():
    x, mask = torch.randn(3, 20, 5), torch.rand(3, 20) < 0.6

    def check(package: ModuleType) -> None:
        module = package.LFQ(dim=5)
        result, terms = module(x, 0.7, True, mask)
        expected = entropies(x[mask][None], 0.7, module.codebook)
        assert_close(torch.stack(terms[:2]).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
        whole = module(x)
        assert torch.equal(result.quantized, whole.quantized)
        assert torch.equal(result.indices, whole.indices)

    check_only_own(check, own, stock)


@pytest.mark.parametrize("shape", [(3,), (3, 20), (3, 4, 5)])
def test_lfq_masks_of_all_shapes_agree(shape):
    module = own.LFQ(dim=4, commitment_loss_weight=0.5)
    mask = torch.rand(shape) < 0.6
    x = torch.randn(3, 4, 4, 5)
    _, terms = module(x, 0.7, True, mask)
    whole = mask.view(*shape, *[1] * (3 - len(shape))).expand(3, 4, 5) if len(shape) == 1 else mask.view(3, 4, 5)
    _, expected = module(x.movedim(1, -1)[whole].view(1, -1, 4), 0.7, True)
    assert_close(terms, expected)


def test_lfq_without_a_valid_vector_has_losses_of_zero():
    def check(package: ModuleType) -> None:
        for fraction in (1.0, 0.5):
            module = package.LFQ(dim=4, commitment_loss_weight=0.5, frac_per_sample_entropy=fraction)
            x = torch.randn(2, 6, 4, requires_grad=True)
            (quantized, _, loss), terms = module(x, 1.0, True, torch.zeros(2).bool())
            assert all(float(each.detach()) == 0 for each in (loss, *terms))
            (loss + quantized.sum()).backward()
            assert torch.equal(x.grad, torch.ones_like(x))

    check_only_own(check, own, stock)


@pytest.mark.parametrize("masked", [False, True])
def test_lfq_fraction_of_vectors_is_sampled_uniformly_without_repeats(masked):
    module = own.LFQ(dim=4, frac_per_sample_entropy=0.3)
    mask = torch.tensor([[True] * 4 + [False] * 4, [True] * 6 + [False] * 2]) if masked else None
    z = torch.zeros(2, 8, 1, 4)
    found = torch.stack([module._sampled(mask, z) for _ in range(3000)]).float()
    size, count = (3, 10) if masked else (4, 16)
    assert (found.sum((1, 2)) == size).all()
    valid = torch.ones(2, 8) if mask is None else mask.float()
    # The standard error of a frequency is below 0.009.
    assert_close(found.mean(0), valid * size / count, rtol=0, atol=0.045)
    pairs = torch.einsum("tbn,tcm->bncm", found, found) / len(found)
    assert_close(pairs[0, 0, 1, 1], torch.tensor(size * (size - 1) / (count * (count - 1))), rtol=0, atol=0.045)


def test_lfq_of_2_to_the_14_codes_materialises_no_matrix():
    module, x = own.LFQ(codebook_size=2**14), (0.1 * torch.randn(2, 14, 32, 32)).requires_grad_()
    with Allocations() as seen:
        loss = module(x).entropy_aux_loss
        loss.backward()
    # The N x K matrix would have 2048 * 2^14 elements, 134 MB.
    assert seen.elements < 2**20, seen.operation


def test_lfq_codebook_is_made_when_it_is_read():
    with Allocations() as seen:
        module = own.LFQ(dim=40, entropy_loss_weight=0.0)
        quantized, indices, loss = module(torch.randn(2, 3, 40))
        decoded = module.indices_to_codes(indices)
        small = own.LFQ(codebook_size=2**18).eval()
        small(torch.randn(2, 3, 18))
    assert torch.equal(decoded, quantized)
    assert float(loss) == 0
    assert seen.elements < 2**10, seen.operation
    assert small.codebook.shape == (2**18, 18)
    assert torch.equal(own.LFQ(dim=6, codebook_scale=0.3).codebook, stock.LFQ(dim=6, codebook_scale=0.3).codebook)


def test_lfq_float64_without_forced_float32_computes_in_float64():
    module = own.LFQ(dim=5, commitment_loss_weight=0.3, force_quantization_f32=False).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    (quantized, _, loss), terms = module(x, 0.5, True)
    assert {each.dtype for each in (quantized, loss, *terms[:2])} == {torch.float64}
    assert_close(torch.stack(terms[:2]), torch.stack(entropies(x, 0.5, module.codebook)), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: module(x, 0.5).entropy_aux_loss, x)

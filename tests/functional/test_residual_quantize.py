from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from dlvae_kernels import residual_decode, residual_quantize, use_backend
from dlvae_kernels.backends import unavailable_reason
from dlvae_kernels.functional import residual_statistics
from dlvae_kernels.testing import assert_accurate, assert_same_codes

from ..allocations import Allocations
from .cases import DTYPES, SIZES, layouts, vectors

OPS = ("residual_quantize_fwd", "residual_quantize_bwd", "residual_statistics", "sparse_decode_fwd")
GRADIENTS = ("once", "each", "rotation", "rotation_each")
L = 3


def books(k: int, d: int, device: torch.device, dtype: torch.dtype = torch.float32, levels: int = L) -> Tensor:
    """Codebooks [levels, K, D] whose codes halve from level to level, as residuals do."""
    return torch.stack([vectors(k, d, device) * 0.5**level for level in range(levels)]).to(dtype)


def residuals_of(x: Tensor, indices: Tensor, codebooks: Tensor) -> tuple[list[Tensor], Tensor]:
    """The definition, one vector operation a level in float32: the residual [N, D] of each level, and quantized."""
    residual = x.to(torch.promote_types(x.dtype, torch.float32))
    residuals, quantized = [], torch.zeros_like(residual)
    for level, codebook in enumerate(codebooks.to(residual.dtype)):
        index = indices[..., level, None]
        code = torch.where(index >= 0, codebook[indices[..., level].clamp(min=0)], 0)
        residuals.append(residual)
        residual, quantized = residual - code, quantized + code
    return residuals, quantized


def rotated(x: Tensor, q: Tensor) -> Tensor:
    """The rotation trick as explicit matrices, which are constants: |q| / |x| (I - 2 s s^T + 2 q' x'^T) x."""
    source, target = (torch.nn.functional.normalize(each.detach(), dim=-1) for each in (x, q))
    middle = torch.nn.functional.normalize(source + target, dim=-1)
    outer = [a[..., :, None] * b[..., None, :] for a, b in ((middle, middle), (target, source))]
    matrix = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) - 2 * outer[0] + 2 * outer[1]
    scale = q.detach().norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True)
    return scale * (matrix @ x[..., None]).squeeze(-1)


def formula(
    x: Tensor, codebooks: Tensor, indices: Tensor, gradient: str, valid: Tensor | None, to: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """By autograd of plain PyTorch in a dtype: losses [L], and the gradients of a sum of all outputs."""
    x_, codes_ = (each.detach().to(to).requires_grad_() for each in (x, codebooks))
    valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if valid is None else valid
    earlier = torch.zeros_like(x_)
    output = torch.zeros_like(x_)
    ran = torch.zeros_like(valid)[..., None]
    losses, sides = [], []
    for level in range(len(codes_)):
        runs = (indices[..., level] >= 0)[..., None]
        code = codes_[level][indices[..., level].clamp(min=0)]
        residual = x_ - earlier
        errors = [(code - residual.detach()) * runs, (code.detach() - residual) * runs]
        losses.append(errors[0].detach().square().sum() / (valid.sum() * x.shape[-1]).clamp(min=1))
        sides.append([error.square().sum() / (valid.sum() * x.shape[-1]).clamp(min=1) for error in errors])
        if gradient == "each":
            output = output + (x_ - x_.detach()) * runs
        if gradient == "rotation_each":
            output = output + torch.where(runs, rotated(residual, code), 0)
        earlier, ran = earlier + code.detach() * runs, ran | runs
    if gradient == "once":
        output = (x_ - x_.detach()) * ran
    if gradient == "rotation":
        output = torch.where(ran, rotated(x_, earlier), 0)
    total = (output * grad_of(x)).sum()
    for level, (codebook_loss, commitment_loss) in enumerate(sides):
        total = total + (level + 1) * codebook_loss + (level + 2) * commitment_loss
    grad_x, grad_codebooks = torch.autograd.grad(total, (x_, codes_), materialize_grads=True)
    return torch.stack(losses), grad_x, grad_codebooks


def rounding_of(dtype: torch.dtype) -> dict[str, float]:
    """The tolerance of values that are equal before they are rounded: Triton's interpreter truncates to bfloat16."""
    is_truncated = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return {"rtol": 2**-7 if is_truncated else 0, "atol": 0}


def grad_of(x: Tensor) -> Tensor:
    """The incoming gradient of quantized in these tests."""
    return torch.linspace(-1, 2, x.numel(), dtype=torch.float64).reshape(x.shape).to(x.device)


def total_of(out, x: Tensor) -> Tensor:
    weights = torch.arange(1, len(out.counts) + 1, device=x.device)
    codebook_loss, commitment_loss = out.codebook_loss * weights, out.commitment_loss * (weights + 1)
    return (out.quantized * grad_of(x).to(x.dtype)).sum() + codebook_loss.sum() + commitment_loss.sum()


@pytest.mark.small
@pytest.mark.every_isa
def test_residual_quantize_two_levels_by_hand(device):
    codebooks = torch.tensor([[[0.0, 0.0], [4.0, 0.0]], [[0.0, 0.0], [-1.0, 1.0]]], device=device, requires_grad=True)
    x = torch.tensor([[3.0, 2.0], [1.0, 0.0]], device=device, requires_grad=True)
    out = residual_quantize(x, codebooks)
    assert out.indices.tolist() == [[1, 1], [0, 0]]
    assert out.quantized.tolist() == [[3, 1], [0, 0]]
    assert out.counts.tolist() == [[1, 1], [1, 1]]
    # Squared errors (1 + 4) + 1, then (0 + 1) + 1, over 4 elements.
    assert out.codebook_loss.tolist() == out.commitment_loss.tolist() == [1.5, 0.5]
    (10 * out.quantized.sum() + out.codebook_loss.sum() + 100 * out.commitment_loss.sum()).backward()
    # The levels leave [-1, 2] and [0, 1] of the first vector, and [1, 0] twice of the second; the slope is 2 / 4.
    assert x.grad.tolist() == [[10 - 50, 10 + 100 + 50], [10 + 50 + 50, 10]]
    assert codebooks.grad.tolist() == [[[-0.5, 0], [0.5, -1]], [[-0.5, 0], [0, -0.5]]]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_residual_quantize_any_size_and_dtype_equals_float64(device, size, dtype):
    n, k, d = size
    x, codebooks = vectors(n, d, device, dtype).requires_grad_(), books(k, d, device, dtype).requires_grad_()
    out = residual_quantize(x, codebooks)
    assert out.quantized.dtype == dtype
    assert out.codebook_loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    residuals, quantized = residuals_of(x.detach(), out.indices, codebooks.detach())
    for level in range(L):
        assert_same_codes(out.indices[:, level], residuals[level], codebooks[level].detach())
        assert torch.equal(out.counts[level], torch.bincount(out.indices[:, level], minlength=k))
    torch.testing.assert_close(out.quantized, quantized.to(dtype), **rounding_of(dtype))
    assert torch.equal(out.codebook_loss, out.commitment_loss)
    found = out.codebook_loss.detach(), *torch.autograd.grad(total_of(out, x), (x, codebooks))
    arguments = x, codebooks, out.indices, "once", None
    for each in zip(found, formula(*arguments, torch.float64), formula(*arguments, dtype), strict=True):
        assert_accurate(*each, floor=1e-5 if dtype in (torch.float32, torch.float64) else 1e-2)


@pytest.mark.every_isa
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("levels", [None, (True, False, True), (False, True, True), (False, False, False)])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_residual_quantize_mask_dropout_and_gradient_equal_float64(device, gradient, levels, is_masked):
    x, codebooks = vectors(150, 10, device).requires_grad_(), books(40, 10, device).requires_grad_()
    valid = torch.rand(150, device=device) < 0.6 if is_masked else None
    dropout = None if levels is None else torch.tensor(levels, device=device)
    out = residual_quantize(x, codebooks, levels=dropout, mask=valid, gradient=gradient)
    runs = torch.ones(150, 1, dtype=torch.bool, device=device) if valid is None else valid[:, None]
    runs = runs & torch.tensor(levels or (True,) * L, device=device)
    assert torch.equal(out.indices >= 0, runs)
    residuals, quantized = residuals_of(x.detach(), out.indices, codebooks.detach())
    for level in range(L):
        chosen = runs[:, level]
        indices = out.indices[chosen, level]
        assert_same_codes(indices, residuals[level][chosen], codebooks[level].detach())
        assert torch.equal(out.counts[level], torch.bincount(indices, minlength=40))
    assert torch.equal(out.quantized, quantized)
    found = out.codebook_loss.detach(), *torch.autograd.grad(total_of(out, x), (x, codebooks))
    arguments = x, codebooks, out.indices, gradient, valid
    for each in zip(found, formula(*arguments, torch.float64), formula(*arguments, torch.float32), strict=True):
        assert_accurate(*each, floor=1e-5)


@pytest.mark.every_isa
def test_residual_quantize_number_of_levels_equals_their_mask(device):
    x, codebooks = vectors(70, 6, device).requires_grad_(), books(9, 6, device).requires_grad_()
    results = []
    for levels in (2, torch.tensor([True, True, False], device=device)):
        out = residual_quantize(x, codebooks, levels=levels, gradient="each")
        results.append([*out, *torch.autograd.grad(total_of(out, x), (x, codebooks))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for a, b in zip(residual_quantize(x, codebooks, levels=L), residual_quantize(x, codebooks), strict=True):
        assert torch.equal(a, b)


@pytest.mark.every_isa
def test_residual_quantize_all_vectors_masked_gives_zeros(device):
    x, codebooks = vectors(20, 6, device), books(9, 6, device).requires_grad_()
    x[3] = torch.nan
    x.requires_grad_()
    out = residual_quantize(x, codebooks, mask=torch.zeros(20, dtype=torch.bool, device=device), gradient="rotation")
    assert (out.indices == -1).all()
    grads = torch.autograd.grad(total_of(out, x), (x, codebooks))
    assert not residual_statistics(x, out.indices, codebooks).any()
    for each in (out.quantized, out.codebook_loss, out.commitment_loss, out.counts, *grads):
        assert not each.any()


@pytest.mark.every_isa
@pytest.mark.parametrize("n", [5, 200])
def test_residual_quantize_equal_codes_take_the_lowest_index(device, n):
    codebooks = torch.randint(-2, 3, (L, 30, 2), device=device).float()
    x = torch.randint(-3, 4, (n, 2), device=device).float()
    residual = x
    out = residual_quantize(x, codebooks)
    for level in range(L):
        distances = (residual[:, None] - codebooks[level]).square().sum(2)
        assert torch.equal(out.indices[:, level], distances.argmin(1))
        residual = residual - codebooks[level][out.indices[:, level]]


@pytest.mark.every_isa
@pytest.mark.parametrize("n", [5, 100])
def test_residual_quantize_vector_with_nan_touches_no_other(device, n):
    x, codebooks = vectors(n, 4, device), books(7, 4, device)
    clean = residual_quantize(x, codebooks)
    x[2, 1] = torch.nan
    out = residual_quantize(x, codebooks)
    assert out.indices[2].tolist() == [0] * L
    assert torch.equal(out.quantized[2], codebooks[0, 0] + codebooks[1, 0] + codebooks[2, 0])
    others = torch.arange(n, device=device) != 2
    assert torch.equal(out.indices[others], clean.indices[others])
    assert torch.equal(out.quantized[others], clean.quantized[others])
    assert out.codebook_loss.isnan().all()
    left_out = residual_quantize(x, codebooks, mask=others)
    assert left_out.codebook_loss.isfinite().all()
    assert torch.equal(left_out.counts, out.counts - residual_quantize(x[2], codebooks).counts)
    statistics = residual_statistics(x, out.indices, codebooks)
    torch.testing.assert_close(statistics, residual_statistics(x[others], out.indices[others], codebooks))


@pytest.mark.every_isa
def test_residual_quantize_float16_beyond_its_range_keeps_float32_sums(device):
    # The sum of both codes is 70000, beyond float16; the vector minus the first is not.
    x = torch.full((20, 1), 60000.0, device=device, dtype=torch.float16)
    codebooks = torch.tensor([[[-10000.0]], [[70000.0]]], device=device)
    out = residual_quantize(x, codebooks)
    assert out.quantized.tolist() == [[60000.0]] * 20
    assert out.commitment_loss.tolist() == pytest.approx([70000.0**2, 0])


@pytest.mark.every_isa
@pytest.mark.parametrize("gradient", ["once", "rotation_each"])
@pytest.mark.parametrize("layout", layouts(2, 2, torch.device("cpu")))
def test_residual_quantize_any_strides_match_contiguous(device, layout, gradient):
    x, codebooks = layouts(50, 12, device)[layout].requires_grad_(), books(24, 12, device)
    copy = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    out, expected = (residual_quantize(each, codebooks, gradient=gradient) for each in (x, copy))
    assert torch.equal(out.quantized, expected.quantized)
    assert torch.equal(out.indices, expected.indices)
    if layout != "expanded":
        assert out.quantized.stride() == torch.empty_like(x).stride()
    (grad,) = torch.autograd.grad(total_of(out, x), x)
    (expected_grad,) = torch.autograd.grad(total_of(expected, copy), copy)
    torch.testing.assert_close(grad, expected_grad)
    statistics = residual_statistics(x, out.indices, codebooks)
    torch.testing.assert_close(statistics, residual_statistics(copy, out.indices, codebooks))


@pytest.mark.every_isa
@pytest.mark.parametrize("n", [0, 3, 300])
def test_residual_statistics_equal_float64(device, n):
    x, codebooks = vectors(n, 9, device), books(12, 9, device)
    indices = torch.randint(-1, 12, (n, L), device=device)
    statistics = residual_statistics(x, indices, codebooks)
    residuals, _ = residuals_of(x, indices, codebooks)
    exact = torch.zeros(L, 12, 10, dtype=torch.float64, device=device)
    for level in range(L):
        found = indices[:, level] >= 0
        rows = torch.cat([residuals[level], torch.ones(n, 1, device=device)], 1)[found].double()
        exact[level].index_add_(0, indices[found, level], rows)
    assert torch.equal(statistics[..., -1].double(), exact[..., -1])
    assert_accurate(statistics, exact, exact)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_decode_of_its_indices_is_quantized(device, dtype):
    x, codebooks = vectors(60, 9, device, dtype), books(12, 9, device, dtype)
    out = residual_quantize(x, codebooks, mask=torch.rand(60, device=device) < 0.7)
    decoded = residual_decode(codebooks, out.indices)
    assert decoded.dtype == dtype
    # Triton may add the codes by a matrix product.
    tolerance = {} if torch.device(device).type == "cuda" else rounding_of(dtype)
    torch.testing.assert_close(decoded, out.quantized, **tolerance)


def test_residual_decode_gradient_equals_float64(device):
    codebooks, indices = books(12, 9, device).requires_grad_(), torch.randint(-1, 12, (4, 30, L), device=device)
    weights = torch.randn(4, 30, 9, device=device)
    decoded = residual_decode(codebooks, indices)
    (grad,) = torch.autograd.grad((decoded * weights).sum(), codebooks)
    codes = codebooks.detach().double().requires_grad_()
    _, exact = residuals_of(torch.zeros(4, 30, 9, dtype=torch.float64, device=device), indices, codes)
    assert_accurate(decoded.detach(), exact.detach(), exact.detach())
    (expected,) = torch.autograd.grad((exact * weights).sum(), codes)
    assert_accurate(grad, expected, expected)


@pytest.mark.float64
def test_residual_quantize_gradcheck_of_the_losses_passes(device):
    x, codebooks = vectors(7, 3, device, torch.float64), books(4, 3, device, torch.float64)
    for mask in (None, x[:, 0] > 0):

        def commitment_loss(vectors, mask=mask):
            return residual_quantize(vectors, codebooks, mask=mask).commitment_loss

        assert torch.autograd.gradcheck(commitment_loss, x.clone().requires_grad_())
    # A loss has a true gradient by the codes of its own level alone.
    for level in range(L):

        def codebook_loss(codes, level=level):
            return residual_quantize(x, codebooks.index_copy(0, torch.tensor([level]), codes)).codebook_loss[level]

        assert torch.autograd.gradcheck(codebook_loss, codebooks[level : level + 1].clone().requires_grad_())


@pytest.mark.large
@pytest.mark.parametrize("gradient", ["once", "rotation_each"])
def test_residual_quantize_repeated_call_is_bitwise_reproducible(device, gradient):
    torch.use_deterministic_algorithms(False)
    results, num_threads = [], torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            x, codebooks = vectors(3000, 16, device).requires_grad_(), books(7, 16, device).requires_grad_()
            out = residual_quantize(x, codebooks, gradient=gradient)
            total_of(out, x).backward()
            statistics = residual_statistics(x, out.indices, codebooks)
            results.append([*(t.detach() for t in out), x.grad, codebooks.grad, statistics])
    finally:
        torch.set_num_threads(num_threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("n", [1, 16, 17, 500])
def test_residual_quantize_native_gives_the_codes_of_the_reference(n):
    if (reason := unavailable_reason("native", "residual_quantize_fwd", torch.zeros(1))) is not None:
        pytest.skip(reason)
    x, codebooks = vectors(n, 24, torch.device("cpu")), books(256, 24, torch.device("cpu"), levels=8)
    results = []
    for backend in ("reference", "native"):
        with use_backend(backend):
            results.append(residual_quantize(x, codebooks))
    reference, native = results
    assert torch.equal(reference.indices, native.indices)
    assert torch.equal(reference.quantized, native.quantized)


def test_residual_quantize_saves_inputs_and_indices_alone(device):
    x, codebooks = vectors(200, 6, device).requires_grad_(), books(90, 6, device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()), lambda _: None):
        residual_quantize(x, codebooks)
    assert sorted(saved) == sorted([x.numel(), codebooks.numel(), 200 * L])


@pytest.mark.large
def test_residual_quantize_allocates_no_distances_and_on_the_cpu_no_vectors_a_level(device):
    if torch.empty(0, device=device).is_cpu and unavailable_reason("native", "residual_quantize_fwd") is not None:
        pytest.skip("the reference computes distances in chunks")
    k, d, levels = 300, 4, 16
    n = 600 if torch.empty(0, device=device).is_cpu else 6000
    x, codebooks = vectors(n, d, device), books(k, d, device, levels=levels)
    indices = torch.randint(-1, k, (n, levels), device=device)
    losses = torch.ones(levels, device=device)
    with use_backend("native" if x.is_cpu else "triton"), Allocations() as allocations:
        torch.ops.dlvae.residual_quantize_fwd(x, codebooks, None, None, "float32", "once")
        torch.ops.dlvae.residual_quantize_bwd(x, losses, losses, x, indices, codebooks, "rotation_each", True, True)
        torch.ops.dlvae.residual_statistics(x, indices, codebooks)
    # On a GPU one kernel writes the residuals of all levels, and the next sums them.
    limit = levels * k * (d + 1) if x.is_cpu else n * d * levels
    assert allocations.elements <= limit < n * k, allocations.operation


def test_residual_quantize_codebooks_changed_before_the_backward_raise(device):
    x, codebooks = vectors(20, 4, device).requires_grad_(), books(5, 4, device)
    out = residual_quantize(x, codebooks)
    codebooks.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.commitment_loss.sum().backward()


def test_residual_quantize_opcheck_passes(device):
    x, codebooks = layouts(20, 6, device)["channel_first"], books(5, 6, device)
    for levels, mask in ((None, None), (torch.tensor([True, False, True], device=device), x[..., 0] > 0)):
        args = x, codebooks, levels, mask, "float32", "once"
        torch.library.opcheck(torch.ops.dlvae.residual_quantize_fwd, args)
    indices = residual_quantize(x, codebooks).indices
    losses = torch.ones(L, device=device)
    for needs in ((True, True), (True, False), (False, True)):
        args = torch.randn_like(x), losses, losses, x, indices, codebooks, "rotation", *needs
        torch.library.opcheck(torch.ops.dlvae.residual_quantize_bwd, args)
    torch.library.opcheck(torch.ops.dlvae.residual_statistics, (x, indices, codebooks))


@pytest.mark.parametrize("levels", [None, 2, "dropout"])
def test_residual_quantize_compiled_whole_matches_eager(device, levels):
    x, codebooks = vectors(40, 6, device).requires_grad_(), books(9, 6, device).requires_grad_()
    mask = torch.rand(40, device=device) < 0.7
    levels = torch.tensor([True, False, True], device=device) if levels == "dropout" else levels

    def run(x, codebooks, mask):
        out = residual_quantize(x, codebooks, levels=levels, mask=mask, gradient="each")
        return out, residual_decode(codebooks, out.indices), residual_statistics(x, out.indices, codebooks)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out, decoded, statistics = function(x, codebooks, mask)
        grads = torch.autograd.grad(total_of(out, x) + decoded.sum(), (x, codebooks))
        results.append([*out, decoded, statistics, *grads])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.every_isa
def test_residual_quantize_without_gradient_records_nothing(device):
    out = residual_quantize(vectors(4, 3, device), books(5, 3, device))
    assert out.quantized.grad_fn is None
    assert out.commitment_loss.grad_fn is None


def test_residual_quantize_bad_input_raises():
    x, codebooks = torch.zeros(2, 3), torch.zeros(4, 5, 3)
    with pytest.raises(ValueError, match=r"expected x of shape \[..., 2\], with the D of codebooks, got \(2, 3\)"):
        residual_quantize(x, torch.zeros(4, 5, 2))
    with pytest.raises(ValueError, match=r"expected codebooks of shape \[L, K, D\] with L, K and D >= 1, got \(5, 3\)"):
        residual_quantize(x, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"expected codebooks of dtype torch.float32, as x has, .*, got torch.float64"):
        residual_quantize(x, codebooks.double())
    with pytest.raises(ValueError, match=r"expected mask of shape \(2,\) and dtype torch.bool, got \(3,\) and torch.b"):
        residual_quantize(x, codebooks, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected levels of shape \(4,\) and dtype torch.bool, got \(4,\) and"):
        residual_quantize(x, codebooks, levels=torch.ones(4, dtype=torch.int64))
    for levels in (0, 5, True, 1.0):
        with pytest.raises(ValueError, match=r"expected levels to be an integer in \[1, 4\], got"):
            residual_quantize(x, codebooks, levels=levels)
    with pytest.raises(ValueError, match=r"expected gradient to be one of 'once', .*, got 'twice'"):
        residual_quantize(x, codebooks, gradient="twice")


def test_residual_decode_and_statistics_bad_indices_raise():
    x, codebooks = torch.zeros(2, 3), torch.zeros(4, 5, 3)
    with pytest.raises(ValueError, match=r"expected indices of shape \[..., 4\], with the L of codebooks, got"):
        residual_decode(codebooks, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected indices of shape \(2, 4\), one for each vector of x and level"):
        residual_statistics(x, torch.zeros(3, 4, dtype=torch.int64), codebooks)
    for index in (-2, 5):
        indices = torch.full((2, 4), -1)
        indices[1, 0] = index
        with pytest.raises(ValueError, match=r"expected indices in \[0, 20\), got"):
            residual_decode(codebooks, indices)
        with pytest.raises(ValueError, match=rf"expected indices in \[-1, 5\) \(-1 stands for no code\), got {index}"):
            residual_statistics(x, indices, codebooks)

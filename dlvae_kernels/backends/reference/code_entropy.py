"""Reference of `code_entropy`, and its gradients: probabilities of one chunk of vectors at a time, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one [n, K] chunk of logits, so that memory stays bounded at any N.
_CHUNK_ELEMENTS = 2**20
# exp of this is 0 in float64.
_LOWEST = -1000.0


def code_entropy_fwd(
    x: Tensor, codebook: Tensor, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    valid = _valid(x, mask)
    entropies = torch.zeros(len(valid), dtype=dtype, device=x.device)
    # The largest logit m of each vector, and the sum of exp(logit - m).
    sums = entropies.new_empty(len(valid), 2)
    total = torch.zeros(len(codebook), dtype=torch.float64, device=x.device)
    for chunk, _, _, logits in _logit_chunks(x, codebook, temperature, valid):
        largest = logits.amax(1, keepdim=True).to(dtype)
        shifted = (logits - largest).clamp_(min=_LOWEST)
        weights = shifted.exp()
        weight = weights.sum(1, keepdim=True)
        entropy = weight.log() - (weights * shifted).sum(1, keepdim=True) / weight
        is_valid = valid[chunk, None]
        entropies[chunk] = torch.where(is_valid, entropy, 0).squeeze(1)
        sums[chunk, :1], sums[chunk, 1:] = torch.where(is_valid, largest, 0), torch.where(is_valid, weight, torch.inf)
        total += torch.where(is_valid, weights / weight, 0).sum(0)
    shape = x.shape[:-1]
    return entropies.view(shape), sums.view(*shape, 2), (total / valid.sum().clamp(min=1)).to(dtype)


def code_entropy_bwd(
    grad_entropies: Tensor,
    grad_mean_probabilities: Tensor,
    x: Tensor,
    codebook: Tensor,
    sums: Tensor,
    entropies: Tensor,
    temperature: float,
    mask: Tensor | None,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    valid = _valid(x, mask)
    slopes = grad_mean_probabilities.double() / valid.sum().clamp(min=1)  # [K]
    grads, own = (each.reshape(len(valid), 1).double() for each in (grad_entropies, entropies))
    sums = sums.reshape(len(valid), 2).double()
    empty = torch.empty(0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    grad_x = empty.new_empty(len(valid), x.shape[-1]) if need_x else empty
    grad_codebook = torch.zeros(codebook.shape if need_codebook else 0, dtype=torch.float64, device=x.device)
    for chunk, vectors, codes, logits in _logit_chunks(x, codebook, temperature, valid):
        largest, weight = sums[chunk].split(1, dim=1)
        logarithms = (logits - largest - weight.log()).clamp_(min=_LOWEST)
        probabilities = logarithms.exp()
        expected = (probabilities @ slopes)[:, None]
        grad_logits = probabilities * (slopes - expected - grads[chunk] * (logarithms + own[chunk]))
        grad_logits = torch.where(valid[chunk, None], grad_logits, 0) * (2 / temperature)
        # The gradients of the logits of a vector add up to 0, which cancels the term of |x|^2.
        if need_x:
            grad_x[chunk] = (grad_logits @ codes).to(grad_x.dtype)
        if need_codebook:
            grad_codebook += grad_logits.T @ vectors - grad_logits.sum(0)[:, None] * codes
    return grad_x.view(x.shape) if need_x else grad_x, grad_codebook.to(grad_x.dtype)


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    """Whether each vector counts, bool [N]."""
    return torch.ones(x.shape[:-1].numel(), dtype=torch.bool, device=x.device) if mask is None else mask.flatten()


def _logit_chunks(
    x: Tensor, codebook: Tensor, temperature: float, valid: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Slices of the batch, their vectors [n, D], the codes [K, D], and logits [n, K], up to a term of each vector."""
    vectors, codes = x.reshape(len(valid), x.shape[-1]), codebook.double()
    size = max(1, _CHUNK_ELEMENTS // len(codes))
    squares = codes.square().sum(1)
    for start in range(0, len(vectors), size):
        chunk = slice(start, start + size)
        in_chunk = torch.where(valid[chunk, None], vectors[chunk].double(), 0)
        yield chunk, in_chunk, codes, (2 * in_chunk @ codes.T - squares) / temperature

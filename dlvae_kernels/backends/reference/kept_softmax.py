"""Reference of `kept_softmax`, and its gradients: logits of one chunk of vectors at a time, k selected for each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one [n, K] chunk of logits, so that memory stays bounded at any N.
_CHUNK_ELEMENTS = 2**21


def kept_softmax_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    codes = indices.reshape(-1, indices.shape[-1])  # [N, k]
    values = torch.empty(codes.shape, dtype=dtype, device=x.device)
    # The largest logit m of each vector, and the sum of exp(logit - m).
    sums = values.new_empty(len(codes), 2)
    for chunk, _, logits in _logit_chunks(x, weight, bias):
        softmax = logits.softmax(1)
        values[chunk] = softmax.gather(1, codes[chunk])
        sums[chunk, 0], sums[chunk, 1] = logits.amax(1), 1 / softmax.amax(1)
    return values.view(indices.shape), sums.view(*x.shape[:-1], 2)


def kept_softmax_bwd(
    grad: Tensor,
    values: Tensor,
    sums: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    k = indices.shape[-1]
    codes = indices.reshape(-1, k)  # [N, k]
    selected = (grad * values).reshape(-1, k)  # [N, k], gradient times value of the selected codes
    slope = selected.sum(1, keepdim=True)  # [N, 1]
    weight = weight.to(selected.dtype)
    empty = selected.new_empty(0)
    grad_x = selected.new_empty(len(codes), x.shape[-1]) if need_x else empty
    grad_weight = selected.new_zeros(weight.shape) if need_weight else empty.clone()
    grad_bias = selected.new_zeros(len(weight)) if need_bias else empty.clone()
    # The sums are bitwise reproducible: the CPU adds the k terms of a vector in order, and on a GPU one term per vector
    # at a time has no two additions to one element.
    step = k if x.device.type == "cpu" else 1
    for chunk, vectors, logits in _logit_chunks(x, weight, bias):
        grad_logits = logits.softmax(1).mul_(-slope[chunk])
        for j in range(0, k, step):
            grad_logits.scatter_add_(1, codes[chunk, j : j + step], selected[chunk, j : j + step])
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                torch.mm(grad_logits, weight, out=grad_x[chunk])
            if need_weight:
                grad_weight.addmm_(grad_logits.T, vectors)
            if need_bias:
                grad_bias += grad_logits.sum(0)
    return grad_x.view(x.shape) if need_x else grad_x, grad_weight, grad_bias


def _logit_chunks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the batch, their vectors [n, D] and logits [n, K], in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    vectors, weight = x.reshape(-1, x.shape[-1]), weight.to(dtype)
    bias = weight.new_zeros(len(weight)) if bias is None else bias.to(dtype)
    size = max(1, _CHUNK_ELEMENTS // len(weight))
    for start in range(0, len(vectors), size):
        chunk = slice(start, start + size)
        in_chunk = vectors[chunk].to(dtype)
        # Autocast would round the product to half precision.
        with torch.autocast(x.device.type, enabled=False):
            logits = torch.addmm(bias, in_chunk, weight.T)
        yield chunk, in_chunk, logits

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
    for part, _, logits in _logit_chunks(x, weight, bias):
        softmax = logits.softmax(1)
        values[part] = softmax.gather(1, codes[part])
        sums[part, 0], sums[part, 1] = logits.amax(1), 1 / softmax.amax(1)
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
    kept = (grad * values).reshape(-1, k)  # [N, k], gradient times value of the selected codes
    slope = kept.sum(1, keepdim=True)  # [N, 1]
    wide = weight.to(kept.dtype)
    empty = kept.new_empty(0)
    grad_x = kept.new_empty(len(codes), x.shape[-1]) if need_x else empty
    grad_weight = kept.new_zeros(wide.shape) if need_weight else empty.clone()
    grad_bias = kept.new_zeros(len(wide)) if need_bias else empty.clone()
    # The sums are bitwise reproducible: the CPU adds along a row in order, and on a GPU one column at a time has no two
    # additions to one element.
    step = k if x.device.type == "cpu" else 1
    for part, rows, logits in _logit_chunks(x, weight, bias):
        grad_logits = logits.softmax(1).mul_(-slope[part])
        for j in range(0, k, step):
            grad_logits.scatter_add_(1, codes[part, j : j + step], kept[part, j : j + step])
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                torch.mm(grad_logits, wide, out=grad_x[part])
            if need_weight:
                grad_weight.addmm_(grad_logits.T, rows)
            if need_bias:
                grad_bias += grad_logits.sum(0)
    return grad_x.view(x.shape) if need_x else grad_x, grad_weight, grad_bias


def _logit_chunks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of vectors [n, D] and their logits [n, K], in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, wide = x.reshape(-1, x.shape[-1]), weight.to(dtype)
    offset = wide.new_zeros(len(wide)) if bias is None else bias.to(dtype)
    chunk = max(1, _CHUNK_ELEMENTS // len(wide))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        row = rows[part].to(dtype)
        # Autocast would round the product to half precision.
        with torch.autocast(x.device.type, enabled=False):
            logits = torch.addmm(offset, row, wide.T)
        yield part, row, logits

"""Triton `kept_softmax`: a softmax over all codes, at the k codes that each vector selects; never [N, K].

The forward pass computes the sums of the softmax tile by tile (`softmax/log_sum_exp.py`). Let g be the gradient of the
selected values v, s = sum of g v, and p the softmax. The gradient of the logits is g v at the selected codes, minus s p
at all codes. The first part is sparse and goes through `sparse_decode`. The second needs s P W for the vectors and
P^T (s x) for the codes, both sums over b of exp(a . b + shifts) b (`softmax/softmax_sum.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gather_codes import gather_codes_bwd
from .language.rows import as_rows
from .softmax.log_sum_exp import log_sum_exp
from .softmax.softmax_sum import softmax_sum
from .sparse_decode import sparse_decode_bwd, sparse_decode_fwd


def _float32_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias, [K] float32; zeros for None."""
    if bias is None:
        return torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    return bias.float().contiguous()


def kept_softmax_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor]:
    selected = indices.reshape(-1, indices.shape[-1]).contiguous()  # [N, k]
    logits, largest, totals = log_sum_exp(as_rows(x), as_rows(weight), _float32_bias(weight, bias), selected)
    values = logits.sub_(largest[:, None]).exp_().div_(totals[:, None])
    return values.view(indices.shape), torch.stack([largest, totals], dim=1).view(*x.shape[:-1], 2)


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
    grad_logits = grad * values  # [..., k]
    largest, totals = sums.view(-1, 2).unbind(1)  # [N]
    slope, x_shift = grad_logits.sum(-1).flatten() / totals, -largest
    code_shift = _float32_bias(weight, bias)
    rows, codes = as_rows(x), as_rows(weight)
    grad_x, grad_weight, grad_bias = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(3))
    if need_x:
        code_sums, _ = softmax_sum(rows, codes, x_shift, code_shift, None)
        grad_x = sparse_decode_fwd(grad_logits, indices, weight).float()
        grad_x.view(code_sums.shape).addcmul_(slope[:, None], code_sums, value=-1)
    if need_weight or need_bias:
        vector_sums, slope_sums = softmax_sum(codes, rows, code_shift, x_shift, slope)
    if need_weight:
        grad_weight = sparse_decode_bwd(x, grad_logits, indices, weight, False, True)[1].sub_(vector_sums)
    if need_bias:
        grad_bias = gather_codes_bwd(grad_logits.unsqueeze(-1), indices, len(weight), 1).squeeze(1) - slope_sums
    return grad_x, grad_weight, grad_bias

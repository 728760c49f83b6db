"""Triton `kept_softmax`: a softmax over all codes at the few that each row keeps, tile by tile; never [N, K].

Forward: online sums, and the logits of the kept codes out of the same tiles. Backward: with g the gradient of the kept
values v and s = sum g v, that of a logit is its kept g v, less s p. The first part is sparse, that of `sparse_decode`;
for the second, s P W and P^T (s x), a tile's logits are made again (as in Dao et al. 2022, arXiv:2205.14135). Both are
sums over b of exp(a . b + shifts) b: of codes for a row, and of rows for a code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gather_codes import gather_codes_bwd
from .log_sum_exp import inner_products, is_wide, log_sum_exp
from .rows import Rows, as_rows, load_rows
from .sparse_decode import sparse_decode_bwd, sparse_decode_fwd
from .tuning import on_device, softmax_sum_config, splits_of


@triton.jit
def _softmax_sum_kernel(
    left_rows,
    right_rows,
    a_shift_ptr,
    b_shift_ptr,
    scale_ptr,
    out_ptr,
    scale_sum_ptr,
    tiles_per_split,
    WIDE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Sums over the b of one split of w b, w = scale_b exp(a . b + shifts): [splits, A, D]; SCALED: also of w."""
    SCALED: tl.constexpr = scale_ptr is not None
    a = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    a_shift = tl.load(a_shift_ptr + a, mask=a < left_rows.num_rows, other=float("-inf"))
    total = tl.zeros([BLOCK_A, BLOCK_OUT], tl.float32)
    scale_sum = tl.zeros([BLOCK_A], tl.float32)
    first = tl.program_id(2).to(tl.int64) * tiles_per_split * BLOCK_B
    for start in range(first, tl.minimum(first + tiles_per_split * BLOCK_B, right_rows.num_rows), BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        weights = inner_products(left_rows, right_rows, a, b, WIDE, BLOCK_D)
        b_shift = tl.load(b_shift_ptr + b, mask=b < right_rows.num_rows, other=float("-inf"))
        # The bias of a code first, as when the largest logit was found.
        if SCALED:
            weights = (weights + a_shift[:, None]) + b_shift[None, :]
        else:
            weights = (weights + b_shift[None, :]) + a_shift[:, None]
        weights = tl.exp(weights)
        if SCALED:
            weights *= tl.load(scale_ptr + b, mask=b < right_rows.num_rows, other=0.0)[None, :]
            scale_sum += tl.sum(weights, axis=1)
        right = load_rows(right_rows, b, d)
        # Weights of half precision would round the sum.
        total = tl.dot(weights, right.to(tl.float32), acc=total, input_precision="tf32x3")
    at = tl.program_id(2).to(tl.int64) * left_rows.num_rows + a
    mask = (a < left_rows.num_rows)[:, None] & (d < left_rows.num_features)[None, :]
    tl.store(out_ptr + at[:, None] * left_rows.num_features + d[None, :], total, mask=mask)
    if SCALED:
        tl.store(scale_sum_ptr + at, scale_sum, mask=(a < left_rows.num_rows) & (tl.program_id(1) == 0))


def _offsets(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias, [K] float32."""
    if bias is None:
        return torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    return bias.float().contiguous()


def kept_softmax_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor]:
    offsets = _offsets(weight, bias)
    kept = indices.reshape(-1, indices.shape[-1]).contiguous()  # [N, k]
    logits, largest, totals = log_sum_exp(as_rows(x), as_rows(weight), offsets, kept)
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
    kept = grad * values  # [..., k]
    largest, totals = sums.view(-1, 2).unbind(1)  # [N]
    slope, row_shift = kept.sum(-1).flatten() / totals, -largest
    offsets = _offsets(weight, bias)
    rows, codes = as_rows(x), as_rows(weight)
    grad_x, grad_weight, grad_bias = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(3))
    if need_x:
        of_codes, _ = _softmax_sum(rows, codes, row_shift, offsets, None)
        grad_x = sparse_decode_fwd(kept, indices, weight).float()
        grad_x.view(of_codes.shape).addcmul_(slope[:, None], of_codes, value=-1)
    if need_weight or need_bias:
        of_rows, scales = _softmax_sum(codes, rows, offsets, row_shift, slope)
    if need_weight:
        grad_weight = sparse_decode_bwd(x, kept, indices, weight, False, True)[1].sub_(of_rows)
    if need_bias:
        grad_bias = gather_codes_bwd(kept.unsqueeze(-1), indices, len(weight)).squeeze(1) - scales
    return grad_x, grad_weight, grad_bias


def _softmax_sum(a: Rows, b: Rows, a_shift: Tensor, b_shift: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each a, sum over all b of w b, [A, D], and of w, [A], w = scale_b exp(a . b + shifts); float32."""
    with on_device(a_shift):
        config = softmax_sum_config(a.num_features, is_wide(a.tensor, b.tensor))
    blocks = triton.cdiv(a.num_rows, config.block_a), triton.cdiv(a.num_features, config.block_out)
    splits, per_split = splits_of(blocks[0] * blocks[1], triton.cdiv(b.num_rows, config.block_b))
    out = torch.empty(splits, a.num_rows, a.num_features, dtype=torch.float32, device=a_shift.device)
    scales = torch.empty(splits, a.num_rows, dtype=torch.float32, device=a_shift.device)
    if out.numel() > 0:
        with on_device(out):
            _softmax_sum_kernel[(*blocks, splits)](
                a,
                b,
                a_shift,
                b_shift,
                scale,
                out,
                scales,
                per_split,
                WIDE=is_wide(a.tensor, b.tensor),
                BLOCK_A=config.block_a,
                BLOCK_B=config.block_b,
                BLOCK_D=config.block_d,
                BLOCK_OUT=config.block_out,
                num_warps=config.num_warps,
            )
    return (out[0], scales[0]) if splits == 1 else (out.sum(0), scales.sum(0))

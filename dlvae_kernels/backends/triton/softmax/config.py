"""Block sizes of the sums over exponentials of logits."""

from __future__ import annotations

from dataclasses import dataclass

from ..architectures import architecture


@dataclass(frozen=True)
class SoftmaxConfig:
    """Tiles of BLOCK_A by BLOCK_B, BLOCK_D features at a time; a program sums BLOCK_OUT features."""

    block_a: int
    block_b: int
    block_d: int
    block_out: int
    num_warps: int


def log_sum_exp_config(wide: bool) -> SoftmaxConfig:
    """The configuration of `log_sum_exp`; wide: products of float32."""
    row = architecture()
    # Both kernels take the same block_d, so that they compute the same logits bit by bit.
    return SoftmaxConfig(128, row.softmax_block_k, row.softmax_block_d[wide], block_out=0, num_warps=8)


def softmax_sum_config(num_features: int, wide: bool) -> SoftmaxConfig:
    """The configuration of `softmax_sum`, with as many features as registers hold: each block repeats the logits."""
    row = architecture()
    block_out = min(row.softmax_block_out[wide], max(16, 1 << (num_features - 1).bit_length()))
    return SoftmaxConfig(64, 32, row.softmax_block_d[wide], block_out, num_warps=8)

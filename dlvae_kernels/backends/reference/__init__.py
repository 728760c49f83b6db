"""Plain PyTorch: the specification of every operation, its fallback and its test oracle in one."""

from __future__ import annotations

from typing import Any

from .code_entropy import code_entropy_bwd, code_entropy_fwd
from .ema_update import ema_statistics, ema_step
from .gather_codes import gather_codes_bwd, gather_codes_fwd
from .kept_softmax import kept_softmax_bwd, kept_softmax_fwd
from .nearest_code import nearest_code
from .one_hot import one_hot
from .residual_quantize import residual_quantize_bwd, residual_quantize_fwd, residual_statistics
from .rotation_trick import rotation_trick_bwd
from .sparse_decode import sparse_decode_bwd, sparse_decode_fwd
from .topk_codes import topk_codes
from .vector_quantize import vector_quantize_bwd, vector_quantize_fwd

__all__ = [
    "code_entropy_bwd",
    "code_entropy_fwd",
    "ema_statistics",
    "ema_step",
    "gather_codes_bwd",
    "gather_codes_fwd",
    "kept_softmax_bwd",
    "kept_softmax_fwd",
    "nearest_code",
    "one_hot",
    "residual_quantize_bwd",
    "residual_quantize_fwd",
    "residual_statistics",
    "rotation_trick_bwd",
    "sparse_decode_bwd",
    "sparse_decode_fwd",
    "topk_codes",
    "vector_quantize_bwd",
    "vector_quantize_fwd",
]


def unavailable_reason(op: str, *args: Any) -> str | None:
    """Return None: the reference is available for everything."""
    return None

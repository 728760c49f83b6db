"""The public functions, one file an operation: checks, docstring, and the `torch.autograd.Function` if it has one."""

from .bit_entropy import BitEntropyOutput, bit_entropy
from .code_entropy import CodeEntropyOutput, code_entropy, entropy
from .ema_update import ema_statistics, ema_step, ema_update
from .gather_codes import gather_codes
from .kept_softmax import kept_softmax
from .nearest_code import nearest_code
from .one_hot import one_hot
from .residual_quantize import ResidualQuantizeOutput, residual_decode, residual_quantize, residual_statistics
from .rotation_trick import rotation_trick
from .sparse_decode import sparse_decode
from .straight_through import straight_through
from .topk_codes import topk_codes
from .vector_quantize import VectorQuantizeOutput, vector_quantize

__all__ = [
    "BitEntropyOutput",
    "CodeEntropyOutput",
    "ResidualQuantizeOutput",
    "VectorQuantizeOutput",
    "bit_entropy",
    "code_entropy",
    "ema_statistics",
    "ema_step",
    "ema_update",
    "entropy",
    "gather_codes",
    "kept_softmax",
    "nearest_code",
    "one_hot",
    "residual_decode",
    "residual_quantize",
    "residual_statistics",
    "rotation_trick",
    "sparse_decode",
    "straight_through",
    "topk_codes",
    "vector_quantize",
]

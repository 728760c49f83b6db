"""Vector-quantization and dictionary-learning layers for PyTorch: exact, deterministic, small in memory."""

from .backends import BackendUnavailable, backend_info, use_backend
from .functional import (
    BitEntropyOutput,
    ResidualQuantizeOutput,
    VectorQuantizeOutput,
    bit_entropy,
    ema_update,
    gather_codes,
    kept_softmax,
    nearest_code,
    one_hot,
    residual_decode,
    residual_quantize,
    sparse_decode,
    topk_codes,
    vector_quantize,
)
from .layers import (
    DictionaryLearning,
    FiniteScalarQuantizer,
    FiniteScalarQuantizerOutput,
    LookupFreeQuantizer,
    LookupFreeQuantizerOutput,
    SparseAutoencoder,
    SparseAutoencoderOutput,
    SparseRepresentation,
    VectorQuantizer,
    VectorQuantizerEMA,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BitEntropyOutput",
    "DictionaryLearning",
    "FiniteScalarQuantizer",
    "FiniteScalarQuantizerOutput",
    "LookupFreeQuantizer",
    "LookupFreeQuantizerOutput",
    "ResidualQuantizeOutput",
    "SparseAutoencoder",
    "SparseAutoencoderOutput",
    "SparseRepresentation",
    "VectorQuantizeOutput",
    "VectorQuantizer",
    "VectorQuantizerEMA",
    "backend_info",
    "bit_entropy",
    "ema_update",
    "gather_codes",
    "kept_softmax",
    "nearest_code",
    "one_hot",
    "residual_decode",
    "residual_quantize",
    "sparse_decode",
    "topk_codes",
    "use_backend",
    "vector_quantize",
]

"""Vector-quantization and dictionary-learning layers for PyTorch: exact, deterministic, small in memory."""

from .backends import BackendUnavailable, backend_info, use_backend
from .functional import (
    ResidualQuantizeOutput,
    VectorQuantizeOutput,
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
    SparseAutoencoder,
    SparseAutoencoderOutput,
    SparseRepresentation,
    VectorQuantizer,
    VectorQuantizerEMA,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "DictionaryLearning",
    "FiniteScalarQuantizer",
    "FiniteScalarQuantizerOutput",
    "ResidualQuantizeOutput",
    "SparseAutoencoder",
    "SparseAutoencoderOutput",
    "SparseRepresentation",
    "VectorQuantizeOutput",
    "VectorQuantizer",
    "VectorQuantizerEMA",
    "backend_info",
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

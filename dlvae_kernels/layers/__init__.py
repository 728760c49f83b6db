"""The `nn.Module`s: parameters, buffers and state_dict; no kernels."""

from .dictionary_learning import DictionaryLearning, SparseRepresentation
from .finite_scalar_quantizer import FiniteScalarQuantizer, FiniteScalarQuantizerOutput
from .kmeans import KMeansOutput, kmeans
from .lookup_free_quantizer import LookupFreeQuantizer, LookupFreeQuantizerOutput
from .sim_vq import SimVQ, SimVQOutput
from .sparse_autoencoder import SparseAutoencoder, SparseAutoencoderOutput
from .vector_quantizer import VectorQuantizer
from .vector_quantizer_ema import VectorQuantizerEMA

__all__ = [
    "DictionaryLearning",
    "FiniteScalarQuantizer",
    "FiniteScalarQuantizerOutput",
    "KMeansOutput",
    "LookupFreeQuantizer",
    "LookupFreeQuantizerOutput",
    "SimVQ",
    "SimVQOutput",
    "SparseAutoencoder",
    "SparseAutoencoderOutput",
    "SparseRepresentation",
    "VectorQuantizer",
    "VectorQuantizerEMA",
    "kmeans",
]

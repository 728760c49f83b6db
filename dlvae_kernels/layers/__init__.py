"""The `nn.Module`s: parameters, buffers and state_dict; no kernels."""

from .codebook import Codebook
from .dictionary_learning import DictionaryLearning, SparseRepresentation
from .finite_scalar_quantizer import FiniteScalarQuantizer, FiniteScalarQuantizerOutput
from .grouped_residual_vector_quantizer import GroupedResidualVectorQuantizer
from .kmeans import KMeansOutput, kmeans
from .lookup_free_quantizer import LookupFreeQuantizer, LookupFreeQuantizerOutput
from .quantizer import VectorQuantizerOutput
from .residual_vector_quantizer import ResidualVectorQuantizer, ResidualVectorQuantizerOutput
from .sim_vq import SimVQ, SimVQOutput
from .sparse_autoencoder import SparseAutoencoder, SparseAutoencoderOutput
from .usage import CodebookUsage
from .vector_quantizer import VectorQuantizer
from .vector_quantizer_ema import VectorQuantizerEMA

__all__ = [
    "Codebook",
    "CodebookUsage",
    "DictionaryLearning",
    "FiniteScalarQuantizer",
    "FiniteScalarQuantizerOutput",
    "GroupedResidualVectorQuantizer",
    "KMeansOutput",
    "LookupFreeQuantizer",
    "LookupFreeQuantizerOutput",
    "ResidualVectorQuantizer",
    "ResidualVectorQuantizerOutput",
    "SimVQ",
    "SimVQOutput",
    "SparseAutoencoder",
    "SparseAutoencoderOutput",
    "SparseRepresentation",
    "VectorQuantizer",
    "VectorQuantizerEMA",
    "VectorQuantizerOutput",
    "kmeans",
]

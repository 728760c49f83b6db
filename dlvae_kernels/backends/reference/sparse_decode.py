"""Reference of `sparse_decode`, and its gradients: each vector is a weighted sum of k atoms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from .segment_sum import CHAIN, segment_sum

# Elements of one temporary chunk in the backward.
_CHUNK_ELEMENTS = 2**21
# Above this K / k the backward gathers the selected atoms; below, products with all atoms are cheaper.
_GATHER_ABOVE = 64


def sparse_decode_fwd(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    dtype = torch.promote_types(dictionary.dtype, torch.float32)
    k = indices.shape[-1]
    out = _sums_of_atoms(values.reshape(-1, k).to(dtype), indices.reshape(-1, k), dictionary.to(dtype))
    return out.view(*indices.shape[:-1], dictionary.shape[1]).to(torch.promote_types(values.dtype, dictionary.dtype))


def _sums_of_atoms(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    """Sum of the k atoms of each vector: [N, D]. Sums of at most CHAIN atoms are added pairwise."""
    k = indices.shape[1]
    if k <= CHAIN:
        return embedding_bag(indices, dictionary, mode="sum", per_sample_weights=values)
    halves = zip(values.split(-(-k // 2), 1), indices.split(-(-k // 2), 1), strict=True)
    first, second = (_sums_of_atoms(*half, dictionary) for half in halves)
    return first + second


def sparse_decode_bwd(
    grad: Tensor, values: Tensor, indices: Tensor, dictionary: Tensor, need_values: bool, need_dictionary: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(dictionary.dtype, torch.float32)
    k = indices.shape[-1]
    vectors = grad.reshape(-1, grad.shape[-1]).to(dtype)  # [N, D]
    coefficients, atoms = values.reshape(-1, k).to(dtype), indices.reshape(-1, k)  # [N, k]
    dictionary = dictionary.to(dtype)
    gathers = len(dictionary) > _GATHER_ABOVE * k
    grad_values, grad_dictionary = (torch.empty(0, dtype=dtype, device=grad.device) for _ in range(2))
    # Autocast would round the matrix products to half precision.
    with torch.autocast(grad.device.type, enabled=False):
        if need_values:
            products = _products_by_gather if gathers else _products
            grad_values = products(vectors, atoms, dictionary).view(values.shape)
        if need_dictionary:
            grad_dictionary = (_sums_by_segment if gathers else _sums)(vectors, coefficients, atoms, len(dictionary))
    return grad_values, grad_dictionary


def _products(vectors: Tensor, atoms: Tensor, dictionary: Tensor) -> Tensor:
    """Inner products of each vector [N, D] with its atoms [N, k], taken from those with all atoms: [N, k]."""
    chunk = _chunk_size(len(dictionary))
    chunks = zip(vectors.split(chunk), atoms.split(chunk), strict=True)
    return torch.cat([(vector @ dictionary.T).gather(1, atom) for vector, atom in chunks])


def _products_by_gather(vectors: Tensor, atoms: Tensor, dictionary: Tensor) -> Tensor:
    """The same as `_products`, computed for the selected atoms only."""
    chunk = _chunk_size(atoms.shape[1] * vectors.shape[1])
    chunks = zip(vectors.split(chunk), atoms.split(chunk), strict=True)
    return torch.cat([(vector[:, None] * dictionary[atom]).sum(2) for vector, atom in chunks])


def _sums(vectors: Tensor, coefficients: Tensor, atoms: Tensor, num_atoms: int) -> Tensor:
    """For each atom the sum of vectors [N, D] weighted by its coefficients, by dense coefficients: [K, D].

    A matrix product sums each block of CHAIN vectors, and the sums of the blocks are added in float64.
    """
    sums = vectors.new_zeros(num_atoms, vectors.shape[1], dtype=torch.float64)
    chunk = CHAIN * -(-_chunk_size(num_atoms) // CHAIN)
    # The sums are bitwise reproducible: the CPU adds the k coefficients of a vector in order, and on a GPU one
    # coefficient per vector at a time has no two additions to one element.
    step = atoms.shape[1] if vectors.device.type == "cpu" else 1
    chunks = zip(vectors.split(chunk), coefficients.split(chunk), atoms.split(chunk), strict=True)
    for vector, coefficient, atom in chunks:
        missing = -len(vector) % CHAIN
        dense = vector.new_zeros(len(vector) + missing, num_atoms)
        for j in range(0, atom.shape[1], step):
            dense[: len(vector)].scatter_add_(1, atom[:, j : j + step], coefficient[:, j : j + step])
        blocks = pad(vector, (0, 0, 0, missing)).view(-1, CHAIN, vector.shape[1])
        sums += (dense.view(-1, CHAIN, num_atoms).mT @ blocks).sum(0, dtype=torch.float64)
    return sums.to(vectors.dtype)


def _sums_by_segment(vectors: Tensor, coefficients: Tensor, atoms: Tensor, num_atoms: int) -> Tensor:
    """The same as `_sums`, by sorting the pairs of vector and atom."""
    vector_of = torch.arange(len(vectors), device=vectors.device).repeat_interleave(atoms.shape[1])  # [N * k]
    return segment_sum(vectors, vector_of, atoms.flatten(), num_atoms, coefficients.flatten())


def _chunk_size(elements: int) -> int:
    """The number of vectors in a chunk, from the number of temporary elements per vector."""
    return max(1, _CHUNK_ELEMENTS // elements)

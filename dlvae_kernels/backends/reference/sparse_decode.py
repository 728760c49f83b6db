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
    rows = grad.reshape(-1, grad.shape[-1]).to(dtype)  # [N, D]
    coefficients, atoms = values.reshape(-1, k).to(dtype), indices.reshape(-1, k)  # [N, k]
    wide = dictionary.to(dtype)
    gathers = len(wide) > _GATHER_ABOVE * k
    grad_values, grad_dictionary = (torch.empty(0, dtype=dtype, device=grad.device) for _ in range(2))
    # Autocast would round the matrix products to half precision.
    with torch.autocast(grad.device.type, enabled=False):
        if need_values:
            grad_values = _products_by_gather(rows, atoms, wide) if gathers else _products(rows, atoms, wide)
            grad_values = grad_values.view(values.shape)
        if need_dictionary:
            grad_dictionary = (_sums_by_segment if gathers else _sums)(rows, coefficients, atoms, len(wide))
    return grad_values, grad_dictionary


def _products(rows: Tensor, atoms: Tensor, dictionary: Tensor) -> Tensor:
    """Inner products of each vector [N, D] with its atoms [N, k], taken from those with all atoms: [N, k]."""
    parts = zip(rows.split(chunk := _rows_of(len(dictionary))), atoms.split(chunk), strict=True)
    return torch.cat([(row @ dictionary.T).gather(1, atom) for row, atom in parts])


def _products_by_gather(rows: Tensor, atoms: Tensor, dictionary: Tensor) -> Tensor:
    """The same as `_products`, computed for the selected atoms alone."""
    parts = zip(rows.split(chunk := _rows_of(atoms.shape[1] * rows.shape[1])), atoms.split(chunk), strict=True)
    return torch.cat([(row[:, None] * dictionary[atom]).sum(2) for row, atom in parts])


def _sums(rows: Tensor, coefficients: Tensor, atoms: Tensor, num_atoms: int) -> Tensor:
    """Sum of vectors [N, D] weighted by their coefficients [N, k] for each atom, by dense coefficients: [K, D].

    Products are taken of blocks of CHAIN vectors, and their sums are added in float64.
    """
    sums = rows.new_zeros(num_atoms, rows.shape[1], dtype=torch.float64)
    chunk = CHAIN * -(-_rows_of(num_atoms) // CHAIN)
    # The sums are bitwise reproducible: the CPU adds along a row in order, and on a GPU one column at a time has no two
    # additions to one element.
    step = atoms.shape[1] if rows.device.type == "cpu" else 1
    for row, coefficient, atom in zip(rows.split(chunk), coefficients.split(chunk), atoms.split(chunk), strict=True):
        missing = -len(row) % CHAIN
        dense = row.new_zeros(len(row) + missing, num_atoms)
        for j in range(0, atom.shape[1], step):
            dense[: len(row)].scatter_add_(1, atom[:, j : j + step], coefficient[:, j : j + step])
        blocks = pad(row, (0, 0, 0, missing)).view(-1, CHAIN, row.shape[1])
        sums += (dense.view(-1, CHAIN, num_atoms).mT @ blocks).sum(0, dtype=torch.float64)
    return sums.to(rows.dtype)


def _sums_by_segment(rows: Tensor, coefficients: Tensor, atoms: Tensor, num_atoms: int) -> Tensor:
    """The same as `_sums`, by sorting the pairs of vector and atom."""
    row_of = torch.arange(len(rows), device=rows.device).repeat_interleave(atoms.shape[1])  # [N * k]
    return segment_sum(rows, row_of, atoms.flatten(), num_atoms, coefficients.flatten())


def _rows_of(elements: int) -> int:
    """The number of vectors with that many elements that make a chunk."""
    return max(1, _CHUNK_ELEMENTS // elements)

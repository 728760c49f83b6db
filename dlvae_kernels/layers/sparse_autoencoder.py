from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional.checks import check_layer_dtype, check_size, check_vectors
from ..functional.sparse_decode import sparse_decode
from ..functional.topk_codes import topk_codes


class SparseAutoencoderOutput(NamedTuple):
    """reconstruction [..., D], and the selected latents: values [..., k], descending, and int64 indices [..., k].

    >>> out = SparseAutoencoder(dim=4, num_atoms=16, k=3)(torch.randn(5, 4))
    >>> out.reconstruction.shape, out.values.shape
    (torch.Size([5, 4]), torch.Size([5, 3]))
    """

    reconstruction: Tensor
    values: Tensor
    indices: Tensor


class _Encoder(nn.Linear):
    def reset_parameters(self) -> None:
        """Do nothing: the enclosing layer initialises the encoder, and a model may reset its modules in any order."""


class SparseAutoencoder(nn.Module):
    """Sparse autoencoder of the k most active of K latents (top-k SAE); no N x K matrix, forward or backward.

    values, indices = the k largest of ReLU(encoder(x - b_dec)),
    reconstruction = sum of values * W_dec[indices] + b_dec.

    Gradients are those of this formula given the indices: from the reconstruction to b_dec, W_dec and the values; from
    the values that are not 0 to the selected rows of encoder.weight and their biases, to x and to b_dec.
    Latents that are not selected have no gradient. All sums are bitwise reproducible.

    Args:
        dim: D, the features of x.
        num_atoms: K, the number of latents.
        k: the number of latents selected for each vector, 1 <= k <= K.
    Raises:
        ValueError: an argument is out of its range.

    Rows of W_dec start as random unit vectors, encoder.weight as their copy, and both biases as 0. Call
    `normalize_decoder` after each step of an optimizer to keep the rows unit vectors.

    state_dict: `encoder.weight` [K, D], `encoder.bias` [K], `W_dec` [K, D], `b_dec` [D], as in EleutherAI's sparsify.

    >>> layer = SparseAutoencoder(dim=4, num_atoms=16, k=3)
    >>> out = layer(torch.randn(5, 4))
    >>> layer.decode(out.values, out.indices).equal(out.reconstruction)
    True

    Source: Gao et al. 2024, arXiv:2406.04093, section 2.3.
    """

    def __init__(self, dim: int, num_atoms: int, k: int) -> None:
        super().__init__()
        self.dim = check_size("dim", dim, 1)
        self.num_atoms = check_size("num_atoms", num_atoms, 1)
        self.k = check_size("k", k, 1, self.num_atoms)
        self.encoder = _Encoder(self.dim, self.num_atoms)
        self.W_dec = nn.Parameter(torch.empty(self.num_atoms, self.dim))
        self.b_dec = nn.Parameter(torch.empty(self.dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters anew, as the constructor does; after `to_empty` too."""
        self.W_dec.normal_()
        self.normalize_decoder()
        self.encoder.weight.copy_(self.W_dec)
        self.encoder.bias.zero_()
        self.b_dec.zero_()

    def forward(self, x: Tensor) -> SparseAutoencoderOutput:
        """Reconstruct vectors from their most active latents.

        Args:
            x: [..., D] float16, bfloat16 or float32, any strides; half precision also for float32 parameters.
        Returns:
            `SparseAutoencoderOutput`; the reconstruction has the dtype of x, the values are float32.
        Raises:
            ValueError: D, dtype or device do not fit.
        """
        values, indices = self.encode(x)
        return SparseAutoencoderOutput(self.decode(values, indices).to(x.dtype), values, indices)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The values and indices of the selected latents; `x` as in `forward`."""
        check_layer_dtype("x", x, self.encoder.weight)
        check_vectors("x", x, "encoder.weight", self.encoder.weight)
        indices, products = topk_codes(
            x - self.b_dec, self.encoder.weight, self.k, metric="dot", bias=self.encoder.bias
        )
        # The largest values after the ReLU are the largest before it, if they are not 0.
        return products.relu(), indices

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Vectors [..., D] of latents given by values and int64 indices, both [..., k].

        Raises:
            ValueError: shapes or dtypes do not fit, or (on the CPU) an index lies outside [0, K).
        """
        return sparse_decode(values, indices, self.W_dec) + self.b_dec

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale the rows of W_dec to length 1, in place; a row of zeros stays zero."""
        lengths = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(lengths.masked_fill_(lengths == 0, 1))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_atoms={self.num_atoms}, k={self.k}"

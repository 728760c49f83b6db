from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional.checks import check_rows, check_size
from ..functional.sparse_decode import sparse_decode
from ..functional.topk_codes import topk_codes


class SparseAutoencoderOutput(NamedTuple):
    """reconstruction [..., D]; of the kept latents values [..., k], descending, and int64 indices [..., k]."""

    reconstruction: Tensor
    values: Tensor
    indices: Tensor


class _Encoder(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: the layer around it initialises it, and a model may reset its modules in any order."""


class SparseAutoencoder(nn.Module):
    """Sparse autoencoder that keeps the k most active of K latents, without an [N, K] tensor in forward or backward.

    values, indices = the k largest of ReLU(encoder(x - b_dec)),
    reconstruction = sum of values * W_dec[indices] + b_dec.

    Gradients are those of this formula given the indices: from the reconstruction to b_dec, W_dec and the values; from
    the values, where they are not 0, to the kept rows of the encoder and their biases, to x and to b_dec. Latents
    that are not kept have none. All sums repeat to the bit.

    Args:
        dim: D, the features of x.
        num_atoms: K, the number of latents.
        k: latents kept for each row, 1 <= k <= K.
    Raises:
        ValueError: an argument is out of its range.

    Rows of W_dec start in random directions, of length 1, those of the encoder are the same, and both biases are 0.
    `normalize_decoder` after each step of an optimizer keeps the length.

    state_dict: `encoder.weight` [K, D], `encoder.bias` [K], `W_dec` [K, D], `b_dec` [D], as in EleutherAI's sparsify.

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
        """Reconstruct rows from their most active latents.

        Args:
            x: [..., D] float16, bfloat16 or float32, any strides; half precision also beside float32 parameters.
        Returns:
            `SparseAutoencoderOutput`; the reconstruction has the dtype of x, the values are float32.
        Raises:
            ValueError: D, dtype or device do not fit.
        """
        values, indices = self.encode(x)
        return SparseAutoencoderOutput(self.decode(values, indices).to(x.dtype), values, indices)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The values and indices of the kept latents; `x` as in `forward`."""
        check_rows("x", x, "encoder.weight", self.encoder.weight)
        indices, products = topk_codes(
            x - self.b_dec, self.encoder.weight, self.k, metric="dot", bias=self.encoder.bias
        )
        # The largest after the ReLU are the largest before it, wherever they are not 0.
        return products.relu(), indices

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Rows [..., D] of latents values and int64 indices, both [..., k].

        Raises:
            ValueError: shapes or dtypes do not fit, or (on the CPU) an index lies outside [0, K).
        """
        return sparse_decode(values, indices, self.W_dec) + self.b_dec

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give the rows of W_dec length 1, in place; a row of zeros stays as it is."""
        lengths = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(lengths.masked_fill_(lengths == 0, 1))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_atoms={self.num_atoms}, k={self.k}"

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import mse_loss

from ..functional.checks import check_at_least, check_choice, check_indices, check_size
from ..functional.kept_softmax import kept_softmax
from ..functional.sparse_decode import sparse_decode
from ..functional.topk_codes import topk_codes
from .maps import codes_to_map, map_to_rows, rows_to_map

Gradient = Literal["straight_through", "direct"]

# Weight of the commitment of x to its reconstruction, as in the notebook.
_COMMITMENT_COST = 0.25


class SparseRepresentation(NamedTuple):
    """Coefficients of the kept atoms: values [B, *spatial, k] and int64 indices [B, *spatial, k]."""

    values: Tensor
    indices: Tensor


class _StraightThrough(torch.autograd.Function):
    """Decoded rows whose gradient passes to x, and the mean of (decoded - x)^2, once for each side to learn by.

    The first mean has a gradient to the decoded rows alone, the second to x alone. Each gradient takes one pass over
    the residuals: out of single operations they would take most of the time of a step that is not spent in kernels.
    """

    @staticmethod
    def forward(rows: Tensor, decoded: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Of the wider dtype, and at least float32, as coefficients are; with the strides of x, which its gradient has.
        residual = rows - decoded
        # In float64: the sum of squares may overflow float32 where the mean does not.
        squares = torch.linalg.vector_norm(residual, dtype=torch.float64).square()
        loss = (squares / max(1, residual.numel())).to(residual.dtype)
        # A copy: what follows may change it in place.
        return decoded.clone(), loss, loss.clone(), residual

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        rows, _, indices = inputs
        *_, residual = output
        ctx.save_for_backward(residual, indices)
        ctx.mark_non_differentiable(residual)
        ctx.dtype = rows.dtype
        # What nobody differentiates stays None, all the way to the parameters.
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_decoded_loss: Tensor | None, grad_rows_loss: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        residual, indices = ctx.saved_tensors
        need_rows, need_decoded, _ = ctx.needs_input_grad
        slope = 2 / max(1, residual.numel())
        grad_rows, grad_decoded = grad, None
        if need_rows and grad is None and grad_rows_loss is not None:
            grad_rows = residual * (grad_rows_loss * slope)
        elif need_rows and grad_rows_loss is not None:
            # The backward of a quantizer whose codes are the decoded rows; half its errors have the other sign.
            grad_loss = -0.5 * grad_rows_loss
            grad_rows, _ = torch.ops.dlvae.vector_quantize_bwd(
                grad, grad_loss, grad_loss, residual, indices, 1, True, False
            )
        if need_decoded and grad_decoded_loss is not None:
            grad_decoded = residual * (grad_decoded_loss * -slope)
        return grad_rows.to(ctx.dtype) if need_rows and grad_rows is not None else None, grad_decoded, None


def _straight_through(rows: Tensor, decoded: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `_StraightThrough` that have a gradient."""
    if not torch.compiler.is_exporting():
        straight, decoded_loss, rows_loss, _ = _StraightThrough.apply(rows, decoded, indices)
        return straight, decoded_loss, rows_loss
    # An exported graph holds operations and no Functions: the same gradients by what is detached.
    fixed_rows, fixed_decoded = rows.detach(), decoded.detach()
    straight = fixed_decoded + (rows - fixed_rows)
    return straight, mse_loss(decoded, fixed_rows.to(decoded.dtype)), mse_loss(rows.to(decoded.dtype), fixed_decoded)


class DictionaryLearning(nn.Module):
    """Sparse coding of each position of a map over a learned dictionary.

    The coefficients are softmax(Linear(x)) over all atoms, kept at the `sparsity_level` atoms nearest to x; the
    reconstruction R is the sum of the atoms with those coefficients.
    loss = mean (sg[x] - R)^2 + 0.25 * mean (x - sg[R])^2 + sparsity * mean over positions of sum |coefficients|.

    Args:
        dim: D, the channels of the map.
        num_atoms: K, the size of the dictionary.
        sparsity: weight of the L1 norm of the coefficients, >= 0; the norm is a mean over positions, so that it
            does not grow with the batch.
        sparsity_level: k, the atoms kept for each position, 1 <= k <= K.
        representation: what `forward` returns last: "dense" ([N, K]) or "sparse" (`SparseRepresentation`).
        gradient: how the reconstruction passes the decoder's gradient: "straight_through" (to x unchanged; the
            dictionary and the coefficients learn by the loss alone) or "direct" (through coefficients and atoms).
        channel_last: maps are [B, *spatial, D].
    Raises:
        ValueError: an argument is out of its range.

    state_dict: `dictionary` [K, D], `representation.0.weight` [K, D], `representation.0.bias` [K].
    """

    def __init__(
        self,
        dim: int,
        num_atoms: int,
        sparsity: float,
        sparsity_level: int,
        *,
        representation: Literal["dense", "sparse"] = "dense",
        gradient: Gradient = "straight_through",
        channel_last: bool = False,
    ) -> None:
        super().__init__()
        self.dim = check_size("dim", dim, 1)
        self.num_atoms = check_size("num_atoms", num_atoms, 1)
        self.sparsity_level = check_size("sparsity_level", sparsity_level, 1, self.num_atoms)
        check_at_least("sparsity", sparsity, 0)
        check_choice("representation", representation, ("dense", "sparse"))
        check_choice("gradient", gradient, ("straight_through", "direct"))
        self.sparsity = sparsity
        self.dictionary = nn.Parameter(torch.rand(self.num_atoms, self.dim))
        self.representation = nn.Sequential(nn.Linear(self.dim, self.num_atoms), nn.Softmax(dim=-1))
        self._representation = representation
        self._gradient = gradient
        self._channel_last = channel_last

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters anew, as the constructor does; after `to_empty` too."""
        self.dictionary.uniform_()
        linear: Any = self.representation[0]
        linear.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | SparseRepresentation]:
        """Reconstruct a map from its sparse coefficients.

        Args:
            x: [B, D, *spatial], or [B, *spatial, D] with channel_last, float16, bfloat16 or float32.
        Returns:
            loss: scalar float32.
            reconstruction: shape and dtype of x.
            representation: the coefficients, dense [B * positions, K] or a `SparseRepresentation`.
        Raises:
            ValueError: rank, D, dtype or device do not fit.
        """
        rows = self._rows(x)
        values, indices = self._code_rows(rows)
        decoded = sparse_decode(values, indices, self.dictionary)
        # The value of the reconstruction, exactly, and not that of x + (R - x).
        straight, dictionary_loss, commitment_loss = _straight_through(rows, decoded, indices[..., 0])
        # Coefficients of a softmax are their own magnitudes.
        norm = values.sum() / max(1, indices[..., 0].numel())
        loss = dictionary_loss + _COMMITMENT_COST * commitment_loss + self.sparsity * norm
        if self._gradient == "straight_through":
            decoded = straight
        reconstruction = rows_to_map(decoded.to(x.dtype), x, self._channel_last)
        if self._representation == "sparse":
            return loss, reconstruction, self._sparse_map(values, indices, x)
        return loss, reconstruction, self._dense(values, indices)

    def encode(self, x: Tensor) -> SparseRepresentation:
        """The kept coefficients of each position; `x` as in `forward`."""
        values, indices = self._code_rows(self._rows(x))
        return self._sparse_map(values, indices, x)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """The map [B, D, *spatial] of coefficients values and int64 indices, both [B, *spatial, k].

        Raises:
            ValueError: shapes or dtypes do not fit, or (on the CPU) an index lies outside [0, K).
        """
        check_indices("indices", indices)
        if indices.ndim < 2:
            raise ValueError(f"indices has shape {tuple(indices.shape)}; it needs [B, *spatial, k]")
        return codes_to_map(sparse_decode(values, indices, self.dictionary), self._channel_last)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_atoms={self.num_atoms}, sparsity={self.sparsity},"
            f" sparsity_level={self.sparsity_level}"
        )

    def _rows(self, x: Tensor) -> Tensor:
        """Check a map and view it as rows [B, S, D]."""
        return map_to_rows("x", x, "dictionary", self.dictionary, self._channel_last)

    def _code_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the nearest atoms and their indices, both [B, S, k]."""
        indices, _ = topk_codes(rows, self.dictionary, self.sparsity_level)
        linear: Any = self.representation[0]
        return kept_softmax(rows, linear.weight, linear.bias, indices), indices

    def _dense(self, values: Tensor, indices: Tensor) -> Tensor:
        values, indices = values.flatten(0, -2), indices.flatten(0, -2)  # [N, k]
        return values.new_zeros(values.shape[0], self.num_atoms).scatter(1, indices, values)

    def _sparse_map(self, values: Tensor, indices: Tensor, x: Tensor) -> SparseRepresentation:
        spatial = x.shape[1:-1] if self._channel_last else x.shape[2:]
        shape = (x.shape[0], *spatial, self.sparsity_level)
        return SparseRepresentation(values.view(shape), indices.view(shape))

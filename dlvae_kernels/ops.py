"""The op table: the schema of each `dlvae::` operation, its fake, and its one implementation, which is the choice of
a backend at each call.

Do not register a kernel on the CPU or CUDA key of these operations: it would bypass the choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import choose

_LIBRARY = torch.library.Library("dlvae", "DEF")
# For operations that take a caller's indices: (position of the indices, how many codes there are).
_Bound = Callable[..., tuple[int, int]]


def _op(schema: str, bound: _Bound | None = None) -> Callable[[Callable[..., Any]], None]:
    """Define `dlvae::<schema>`; the decorated function is its fake."""
    name = schema[: schema.index("(")]

    def run(*args: Any) -> Any:
        if bound is not None:
            position, size = bound(*args)
            _check_range(args[position], size)
        return choose(name, *args)(*args)

    def register(fake: Callable[..., Any]) -> None:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dlvae::{name}", fake, lib=_LIBRARY)

    return register


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give `dlvae::<name>` a gradient, for graphs that hold the operation itself."""
    torch.library.register_autograd(f"dlvae::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def _check_range(indices: Tensor, size: int) -> None:
    """Indices must lie in [0, size). On CUDA looking would synchronise: there it is left to DLVAE_CHECK=1."""
    if indices.numel() == 0:
        return
    if indices.device.type == "cpu":
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"expected indices in [0, {size}), got {low if low < 0 else high}")
    elif os.environ.get("DLVAE_CHECK") == "1":
        torch._assert_async(((indices >= 0) & (indices < size)).all())


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of `dtype` accumulate and come out."""
    return torch.promote_types(dtype, torch.float32)


@_op("nearest_code(Tensor x, Tensor codebook, bool return_distance, str precision) -> (Tensor, Tensor)")
def _(x: Tensor, codebook: Tensor, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    distances = x.new_empty(rows if return_distance else (0,), dtype=_wide(x.dtype))
    return x.new_empty(rows, dtype=torch.int64), distances


@_op("topk_codes(Tensor x, Tensor dictionary, int k, str metric, Tensor? bias) -> (Tensor, Tensor)")
def _(x: Tensor, dictionary: Tensor, k: int, metric: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=_wide(x.dtype))


@_op("one_hot(Tensor indices, int num_codes, ScalarType dtype) -> Tensor", lambda i, size, dtype: (0, size))
def _(indices: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
    return indices.new_empty((indices.shape[0], num_codes), dtype=dtype)


@_op("gather_codes_fwd(Tensor codebook, Tensor indices) -> Tensor", lambda c, i: (1, c.shape[0]))
def _(codebook: Tensor, indices: Tensor) -> Tensor:
    return codebook.new_empty((*indices.shape, codebook.shape[1]))


@_op("gather_codes_bwd(Tensor grad, Tensor indices, int num_codes) -> Tensor")
def _(grad: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    return grad.new_empty((num_codes, grad.shape[-1]), dtype=_wide(grad.dtype))


@_op(
    "vector_quantize_fwd(Tensor x, Tensor codebook, bool need_error, str precision)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _(
    x: Tensor, codebook: Tensor, need_error: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=_wide(x.dtype))
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    counts = x.new_empty(codebook.shape[:1], dtype=torch.int64)
    half_error = torch.empty_like(x) if need_error else x.new_empty(0)
    return torch.empty_like(x), indices, loss, torch.empty_like(loss), counts, half_error


@_op(
    "vector_quantize_bwd(Tensor grad_quantized, Tensor grad_codebook_loss, Tensor grad_commitment_loss,"
    " Tensor half_error, Tensor indices, int num_codes, bool need_x, bool need_codebook) -> (Tensor, Tensor)"
)
def _(
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    half_error: Tensor,
    indices: Tensor,
    num_codes: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    empty = half_error.new_empty(0, dtype=_wide(half_error.dtype))
    grad_codebook = empty.new_empty((num_codes, half_error.shape[-1])) if need_codebook else torch.empty_like(empty)
    return torch.empty_like(half_error) if need_x else empty, grad_codebook


@_op("ema_statistics(Tensor x, Tensor indices, int num_codes) -> Tensor", lambda x, i, size: (1, size))
def _(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    return x.new_empty((num_codes, x.shape[-1] + 1), dtype=_wide(x.dtype))


@_op(
    "ema_step(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum, Tensor statistics, float decay,"
    " float epsilon) -> ()"
)
def _(*args: Any) -> None:
    return None


@_op(
    "sparse_decode_fwd(Tensor values, Tensor indices, Tensor dictionary) -> Tensor",
    lambda v, i, dictionary: (1, dictionary.shape[0]),
)
def _(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    dtype = torch.promote_types(values.dtype, dictionary.dtype)
    return values.new_empty((*indices.shape[:-1], dictionary.shape[1]), dtype=dtype)


@_op(
    "sparse_decode_bwd(Tensor grad, Tensor values, Tensor indices, Tensor dictionary, bool need_values,"
    " bool need_dictionary) -> (Tensor, Tensor)"
)
def _(
    grad: Tensor, values: Tensor, indices: Tensor, dictionary: Tensor, need_values: bool, need_dictionary: bool
) -> tuple[Tensor, Tensor]:
    empty = grad.new_empty(0, dtype=_wide(dictionary.dtype))
    grad_values = empty.new_empty(values.shape) if need_values else empty
    return grad_values, empty.new_empty(dictionary.shape) if need_dictionary else torch.empty_like(empty)


@_op(
    "kept_softmax_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor indices) -> (Tensor, Tensor)",
    lambda x, weight, bias, i: (3, weight.shape[0]),
)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _wide(x.dtype)
    return x.new_empty(indices.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 2), dtype=dtype)


@_op(
    "kept_softmax_bwd(Tensor grad, Tensor values, Tensor sums, Tensor x, Tensor weight, Tensor? bias, Tensor indices,"
    " bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)
def _(
    grad: Tensor,
    values: Tensor,
    sums: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, need_x), (weight.shape, need_weight), (weight.shape[:1], need_bias)
    x_like, weight_like, bias_like = (values.new_empty(shape if need else (0,)) for shape, need in shapes)
    return x_like, weight_like, bias_like

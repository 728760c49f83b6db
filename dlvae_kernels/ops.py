"""The table of operations: the schema of each `dlvae::` operation, its fake implementation, and a function that returns
the indices to range-check.

The one implementation of an operation is its router, which runs each call on a backend. Do not register a kernel on the
CPU or CUDA key of these operations: it would bypass the router.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import find_route

_LIBRARY = torch.library.Library("dlvae", "DEF")
# The classes of tensors that change nothing about an operation.
_PLAIN = (Tensor, torch.nn.Parameter)


class Operation(NamedTuple):
    """One row of the table."""

    schema: str
    # Takes the arguments of the operation and returns empty outputs of the right shapes and dtypes.
    fake: Callable[..., Any]
    # Takes the arguments of the operation and returns the caller's indices and the number of codes that bounds them.
    indices: Callable[..., tuple[Tensor, int]] | None = None
    # The lowest index in range: -1 where it stands for no code.
    lowest: int = 0


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give `dlvae::<name>` a gradient for reverse mode, in eager code and in graphs."""
    torch.library.register_autograd(f"dlvae::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of `dtype` accumulate and are returned."""
    return torch.promote_types(dtype, torch.float32)


def _nearest_code(x: Tensor, codebook: Tensor, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    shape = x.shape[:-1]
    distances = x.new_empty(shape if return_distance else (0,), dtype=_sum_dtype(x.dtype))
    return x.new_empty(shape, dtype=torch.int64), distances


def _topk_codes(x: Tensor, dictionary: Tensor, k: int, metric: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=_sum_dtype(x.dtype))


def _one_hot(indices: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
    return indices.new_empty((indices.shape[0], num_codes), dtype=dtype)


def _gather_codes_fwd(codebook: Tensor, indices: Tensor) -> Tensor:
    return codebook.new_empty((*indices.shape, codebook.shape[-1]))


def _gather_codes_bwd(grad: Tensor, indices: Tensor, num_codes: int, num_heads: int) -> Tensor:
    return grad.new_empty((num_heads * num_codes, grad.shape[-1]), dtype=_sum_dtype(grad.dtype))


def _vector_quantize_fwd(
    x: Tensor, codebook: Tensor, need_error: bool, precision: str, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=_sum_dtype(x.dtype))
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    counts = x.new_empty(codebook.shape[:-1], dtype=torch.int64)
    half_error = torch.empty_like(x) if need_error else x.new_empty(0)
    return torch.empty_like(x), indices, loss, torch.empty_like(loss), counts, half_error


def _vector_quantize_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    *_, half_error, _, num_codes, num_heads, need_x, need_codebook = args
    empty = half_error.new_empty(0, dtype=_sum_dtype(half_error.dtype))
    shape = (num_heads * num_codes, half_error.shape[-1])
    grad_codebook = empty.new_empty(shape) if need_codebook else torch.empty_like(empty)
    return torch.empty_like(half_error) if need_x else empty, grad_codebook


def _rotation_trick_bwd(grad: Tensor, x: Tensor, q: Tensor) -> Tensor:
    return torch.empty_like(x)


def _ema_statistics(x: Tensor, indices: Tensor, num_codes: int, num_heads: int) -> Tensor:
    return x.new_empty((num_heads * num_codes, x.shape[-1] + 1), dtype=_sum_dtype(x.dtype))


def _ema_step(
    codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor, statistics: Tensor, decay: float, epsilon: float
) -> None:
    return None


def _residual_quantize_fwd(
    x: Tensor, codebooks: Tensor, levels: Tensor | None, mask: Tensor | None, precision: str, gradient: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_levels, num_codes, _ = codebooks.shape
    losses = x.new_empty(num_levels, dtype=_sum_dtype(x.dtype))
    indices = x.new_empty((*x.shape[:-1], num_levels), dtype=torch.int64)
    counts = x.new_empty((num_levels, num_codes), dtype=torch.int64)
    return torch.empty_like(x), indices, losses, torch.empty_like(losses), counts


def _residual_quantize_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    _, _, _, x, _, codebooks, _, need_x, need_codebooks = args
    empty = x.new_empty(0, dtype=_sum_dtype(x.dtype))
    grad_codebooks = empty.new_empty(codebooks.shape) if need_codebooks else torch.empty_like(empty)
    return torch.empty_like(x) if need_x else empty, grad_codebooks


def _residual_statistics(x: Tensor, indices: Tensor, codebooks: Tensor) -> Tensor:
    num_levels, num_codes, num_features = codebooks.shape
    return x.new_empty((num_levels, num_codes, num_features + 1), dtype=_sum_dtype(x.dtype))


def _sparse_decode_fwd(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    dtype = torch.promote_types(values.dtype, dictionary.dtype)
    return values.new_empty((*indices.shape[:-1], dictionary.shape[1]), dtype=dtype)


def _sparse_decode_bwd(
    grad: Tensor, values: Tensor, indices: Tensor, dictionary: Tensor, need_values: bool, need_dictionary: bool
) -> tuple[Tensor, Tensor]:
    empty = grad.new_empty(0, dtype=_sum_dtype(dictionary.dtype))
    grad_values = empty.new_empty(values.shape) if need_values else empty
    return grad_values, empty.new_empty(dictionary.shape) if need_dictionary else torch.empty_like(empty)


def _kept_softmax_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _sum_dtype(x.dtype)
    return x.new_empty(indices.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 2), dtype=dtype)


def _kept_softmax_bwd(grad: Tensor, values: Tensor, sums: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, _, _, need_x, need_weight, need_bias = args
    shapes = (x.shape, need_x), (weight.shape, need_weight), (weight.shape[:1], need_bias)
    x_like, weight_like, bias_like = (values.new_empty(shape if need else (0,)) for shape, need in shapes)
    return x_like, weight_like, bias_like


def _code_entropy_fwd(
    x: Tensor, codebook: Tensor, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    entropies = x.new_empty(x.shape[:-1], dtype=_sum_dtype(x.dtype))
    return entropies, entropies.new_empty((*x.shape[:-1], 2)), entropies.new_empty(codebook.shape[:1])


def _code_entropy_bwd(
    grad_entropies: Tensor, grad_mean_probabilities: Tensor, x: Tensor, codebook: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    *_, need_x, need_codebook = args
    empty = x.new_empty(0, dtype=_sum_dtype(x.dtype))
    grad_x = empty.new_empty(x.shape) if need_x else empty
    return grad_x, empty.new_empty(codebook.shape) if need_codebook else torch.empty_like(empty)


OPERATIONS = (
    Operation(
        "nearest_code(Tensor x, Tensor codebook, bool return_distance, str precision) -> (Tensor, Tensor)",
        _nearest_code,
    ),
    Operation(
        "topk_codes(Tensor x, Tensor dictionary, int k, str metric, Tensor? bias) -> (Tensor, Tensor)", _topk_codes
    ),
    Operation(
        "one_hot(Tensor indices, int num_codes, ScalarType dtype) -> Tensor",
        _one_hot,
        lambda indices, num_codes, dtype: (indices, num_codes),
        lowest=-1,
    ),
    Operation(
        "gather_codes_fwd(Tensor codebook, Tensor indices) -> Tensor",
        _gather_codes_fwd,
        lambda codebook, indices: (indices, codebook.shape[-2]),
        lowest=-1,
    ),
    Operation(
        "gather_codes_bwd(Tensor grad, Tensor indices, int num_codes, int num_heads) -> Tensor", _gather_codes_bwd
    ),
    Operation(
        "vector_quantize_fwd(Tensor x, Tensor codebook, bool need_error, str precision, Tensor? mask)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _vector_quantize_fwd,
    ),
    Operation(
        "vector_quantize_bwd(Tensor grad_quantized, Tensor grad_codebook_loss, Tensor grad_commitment_loss,"
        " Tensor half_error, Tensor indices, int num_codes, int num_heads, bool need_x, bool need_codebook)"
        " -> (Tensor, Tensor)",
        _vector_quantize_bwd,
    ),
    Operation("rotation_trick_bwd(Tensor grad, Tensor x, Tensor q) -> Tensor", _rotation_trick_bwd),
    Operation(
        "ema_statistics(Tensor x, Tensor indices, int num_codes, int num_heads) -> Tensor",
        _ema_statistics,
        lambda x, indices, num_codes, num_heads: (indices, num_codes),
        lowest=-1,
    ),
    Operation(
        "ema_step(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum, Tensor statistics, float decay,"
        " float epsilon) -> ()",
        _ema_step,
    ),
    Operation(
        "residual_quantize_fwd(Tensor x, Tensor codebooks, Tensor? levels, Tensor? mask, str precision, str gradient)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _residual_quantize_fwd,
    ),
    Operation(
        "residual_quantize_bwd(Tensor grad_quantized, Tensor grad_codebook_loss, Tensor grad_commitment_loss, Tensor x,"
        " Tensor indices, Tensor codebooks, str gradient, bool need_x, bool need_codebooks) -> (Tensor, Tensor)",
        _residual_quantize_bwd,
    ),
    Operation(
        "residual_statistics(Tensor x, Tensor indices, Tensor codebooks) -> Tensor",
        _residual_statistics,
        lambda x, indices, codebooks: (indices, codebooks.shape[1]),
        lowest=-1,
    ),
    Operation(
        "sparse_decode_fwd(Tensor values, Tensor indices, Tensor dictionary) -> Tensor",
        _sparse_decode_fwd,
        lambda values, indices, dictionary: (indices, dictionary.shape[0]),
    ),
    Operation(
        "sparse_decode_bwd(Tensor grad, Tensor values, Tensor indices, Tensor dictionary, bool need_values,"
        " bool need_dictionary) -> (Tensor, Tensor)",
        _sparse_decode_bwd,
    ),
    Operation(
        "kept_softmax_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor indices) -> (Tensor, Tensor)",
        _kept_softmax_fwd,
        lambda x, weight, bias, indices: (indices, weight.shape[0]),
    ),
    Operation(
        "kept_softmax_bwd(Tensor grad, Tensor values, Tensor sums, Tensor x, Tensor weight, Tensor? bias,"
        " Tensor indices, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
        _kept_softmax_bwd,
    ),
    Operation(
        "code_entropy_fwd(Tensor x, Tensor codebook, float temperature, Tensor? mask) -> (Tensor, Tensor, Tensor)",
        _code_entropy_fwd,
    ),
    Operation(
        "code_entropy_bwd(Tensor grad_entropies, Tensor grad_mean_probabilities, Tensor x, Tensor codebook,"
        " Tensor sums, Tensor entropies, float temperature, Tensor? mask, bool need_x, bool need_codebook)"
        " -> (Tensor, Tensor)",
        _code_entropy_bwd,
    ),
)


def call(name: str, *args: Any) -> Any:
    """Run `dlvae::<name>` on arguments that autograd does not record.

    Eager code calls the router itself, because torch's dispatcher takes 5 us, half of the overhead of a small call.
    Graphs, dispatch modes, transforms of torch.func, meta tensors and subclasses need the operation.
    """
    if _is_traced():
        return getattr(torch.ops.dlvae, name)(*args)
    for arg in args:
        if isinstance(arg, Tensor) and (type(arg) not in _PLAIN or arg.is_meta):
            return getattr(torch.ops.dlvae, name)(*args)
    return _ROUTERS[name](*args)


def _is_traced() -> bool:
    """Whether a graph, a dispatch mode or a transform of torch.func records operations."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _router(operation: Operation) -> Callable[..., Any]:
    """The implementation of an operation, which runs each call on the backend of its route."""
    name, indices_of, lowest = operation.schema.partition("(")[0], operation.indices, operation.lowest

    def run(*args: Any) -> Any:
        return find_route(name, *args).function(*args)

    def run_with_range_check(*args: Any) -> Any:
        function, checks_indices = find_route(name, *args)
        if not checks_indices:
            _check_range(*indices_of(*args), lowest=lowest)  # type: ignore[misc]
            return function(*args)
        try:
            return function(*args)
        except RuntimeError:
            # The C++ kernels check indices as they read them. This check raises the ValueError of all backends.
            _check_range(*indices_of(*args), lowest=lowest)  # type: ignore[misc]
            raise

    return run if indices_of is None else run_with_range_check


def _check_range(indices: Tensor, num_codes: int, *, lowest: int = 0) -> None:
    """Check that indices lie in [lowest, num_codes).

    On CUDA the values would have to be copied to the host, which synchronises: there, the check runs on the device and
    only under DLVAE_CHECK=1.
    """
    if indices.numel() == 0:
        return
    if indices.device.type == "cpu":
        low, high = (int(bound) for bound in indices.aminmax())
        if low < lowest or high >= num_codes:
            meaning = " (-1 stands for no code)" if lowest < 0 else ""
            got = low if low < lowest else high
            raise ValueError(f"expected indices in [{lowest}, {num_codes}){meaning}, got {got}")
    elif os.environ.get("DLVAE_CHECK") == "1":
        torch._assert_async(((indices >= lowest) & (indices < num_codes)).all())


def _register(operation: Operation) -> None:
    name = operation.schema.partition("(")[0]
    _LIBRARY.define(operation.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _ROUTERS[name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"dlvae::{name}", operation.fake, lib=_LIBRARY)


_ROUTERS = {operation.schema.partition("(")[0]: _router(operation) for operation in OPERATIONS}
for _operation in OPERATIONS:
    _register(_operation)

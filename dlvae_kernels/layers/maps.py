"""Views of feature maps as vectors and back, their masks, and the dtypes of their indices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.checks import check_layer_dtype, check_same_device, check_tensor

# The dtypes of indices that a layer returns, and the largest number of codes that each holds.
_INDEX_DTYPES = {torch.int64: 2**63, torch.int32: 2**31, torch.uint16: 2**16}


def map_to_vectors(
    name: str,
    inputs: Tensor,
    parameter_name: str,
    parameter: Tensor,
    channel_last: bool,
    num_features: int | None = None,
) -> Tensor:
    """View a map [B, D, *spatial] as vectors [B, S, D], S the number of positions; [B, *spatial, D] is returned as is.

    D is `num_features`, by default the last size of the parameter.

    Raises:
        ValueError: rank or D do not fit, or dtype or device do not fit the parameter of the layer.
    """
    num_features = parameter.shape[-1] if num_features is None else num_features
    vectors = features_last(name, inputs, num_features, channel_last)
    check_layer_dtype(name, vectors, parameter)
    check_same_device(name, vectors, parameter_name, parameter)
    return vectors


def features_last(name: str, inputs: Tensor, num_features: int, channel_last: bool) -> Tensor:
    """The view of `map_to_vectors` of a map with D = num_features, where there is no parameter to compare with.

    Raises:
        ValueError: rank or D do not fit; the message uses `name`.
    """
    check_tensor(name, inputs)
    if inputs.ndim < 2 or inputs.shape[-1 if channel_last else 1] != num_features:
        expected, other = f"[B, {num_features}, ...]", f"[B, ..., {num_features}]"
        if channel_last:
            expected, other = other, expected
        # Pass the option as a remedy only where it helps.
        fits_other = inputs.ndim >= 2 and inputs.shape[1 if channel_last else -1] == num_features
        kind = "channels-first" if channel_last else "channels-last"
        remedy = f"; for {kind} {name} of shape {other} pass channel_last={not channel_last}" if fits_other else ""
        raise ValueError(f"expected {name} of shape {expected}, got {tuple(inputs.shape)}{remedy}")
    return inputs if channel_last or inputs.ndim == 2 else inputs.flatten(2).transpose(1, 2)


def vectors_to_map(vectors: Tensor, like: Tensor, channel_last: bool) -> Tensor:
    """The inverse of `map_to_vectors` for the map `like`."""
    if channel_last or like.ndim == 2:
        return vectors
    return vectors.transpose(1, 2).unflatten(2, like.shape[2:])


def codes_to_map(codes: Tensor, channel_last: bool) -> Tensor:
    """View the codes of every position, [B, *spatial, D], as a map in the layout of the layer."""
    return codes if channel_last else codes.movedim(-1, 1)


def spatial_shape(inputs: Tensor, channel_last: bool) -> torch.Size:
    """[B, *spatial] of a map."""
    return inputs.shape[:-1] if channel_last else inputs.shape[:1] + inputs.shape[2:]


def mask_to_vectors(mask: Tensor | None, inputs: Tensor, channel_last: bool) -> Tensor | None:
    """View a mask [B, *spatial] as that of the vectors of `map_to_vectors`.

    Raises:
        ValueError: not bool, or not one value for each position of the map.
    """
    if mask is None:
        return None
    check_tensor("mask", mask)
    expected = spatial_shape(inputs, channel_last)
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(
            f"expected mask of dtype torch.bool and shape {tuple(expected)}, one value for each position,"
            f" got {mask.dtype} and {tuple(mask.shape)}"
        )
    check_same_device("mask", mask, "inputs", inputs)
    return mask if channel_last or inputs.ndim == 2 else mask.flatten(1)


def check_index_dtype(dtype: torch.dtype, num_codes: int) -> None:
    """Check that indices of this dtype hold every code."""
    if dtype not in _INDEX_DTYPES:
        raise ValueError(f"expected index_dtype to be one of {', '.join(map(str, _INDEX_DTYPES))}, got {dtype}")
    if num_codes > _INDEX_DTYPES[dtype]:
        remedy = "torch.int64" if num_codes <= _INDEX_DTYPES[torch.int64] else "fewer codes"
        raise ValueError(f"expected index_dtype to hold {num_codes} codes, got {dtype}; pass {remedy}")


def check_holds_no_code(dtype: torch.dtype, reason: str) -> None:
    """Check that indices of this dtype hold -1, which `reason` requires."""
    if not dtype.is_signed:
        raise ValueError(
            f"expected a signed index_dtype with {reason}, for the index -1 of no code, got {dtype}; pass torch.int32"
        )


def long_indices(indices: Tensor) -> Tensor:
    """Indices of any integer dtype as int64."""
    check_tensor("indices", indices)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"expected indices of dtype torch.int64 or another integer, got {indices.dtype}")
    return indices.long()


def check_index_range(indices: Tensor, num_codes: int) -> None:
    """Check that indices lie in [-1, num_codes), where this neither synchronises with a device nor breaks a graph."""
    if indices.is_cpu and indices.numel() > 0 and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < -1 or high >= num_codes:
            raise ValueError(
                f"expected indices in [-1, {num_codes}) (-1 stands for no code), got {low if low < -1 else high}"
            )

"""Views of feature maps as vectors, and back."""

from __future__ import annotations

from torch import Tensor

from ..functional.checks import check_layer_dtype, check_tensor, check_vectors


def map_to_vectors(name: str, inputs: Tensor, codes_name: str, codes: Tensor, channel_last: bool) -> Tensor:
    """View a map [B, D, *spatial] as vectors [B, S, D], S the number of positions; [B, *spatial, D] is returned as is.

    Raises:
        ValueError: rank, D, dtype or device do not fit codes [K, D]; the message uses `name` and `codes_name`.
    """
    vectors = features_last(name, inputs, codes.shape[1], channel_last)
    check_layer_dtype(name, vectors, codes)
    check_vectors(name, vectors, codes_name, codes)
    return vectors


def features_last(name: str, inputs: Tensor, num_features: int, channel_last: bool) -> Tensor:
    """The view of `map_to_vectors` of a map with D = num_features, where there are no codes to compare with.

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

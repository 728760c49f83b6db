"""Feature maps as rows and back, by views alone."""

from __future__ import annotations

from torch import Tensor

from ..functional.checks import check_rows, check_tensor


def map_to_rows(name: str, inputs: Tensor, codes_name: str, codes: Tensor, channel_last: bool) -> Tensor:
    """View a map [B, D, *spatial] as rows [B, S, D], S the number of positions; [B, *spatial, D] is rows already.

    Raises:
        ValueError: rank, D, dtype or device do not go with codes [K, D]; it calls the two by the names given.
    """
    check_tensor(name, inputs)
    layout = "[B, *spatial, D]" if channel_last else "[B, D, *spatial]"
    dim = codes.shape[1]
    if inputs.ndim < 2 or inputs.shape[-1 if channel_last else 1] != dim:
        raise ValueError(f"{name} has shape {tuple(inputs.shape)}; it needs {layout} with D = {dim}")
    rows = inputs if channel_last or inputs.ndim == 2 else inputs.flatten(2).transpose(1, 2)
    check_rows(name, rows, codes_name, codes)
    return rows


def rows_to_map(rows: Tensor, like: Tensor, channel_last: bool) -> Tensor:
    """The inverse of `map_to_rows` for the map `like`."""
    if channel_last or like.ndim == 2:
        return rows
    return rows.transpose(1, 2).unflatten(2, like.shape[2:])


def codes_to_map(rows: Tensor, channel_last: bool) -> Tensor:
    """Codes looked up for every position, [B, *spatial, D], in the layout of the layer's maps."""
    return rows if channel_last else rows.movedim(-1, 1)

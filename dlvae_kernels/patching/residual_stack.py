"""`encode(x [B, D, T]) -> indices [L, B, T]` of a residual stack whose levels all have the search of `euclidean`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ..functional.residual_quantize import residual_quantize
from .euclidean import codebook_of, has_codebook
from .euclidean import recognise as recognise_level
from .handler import Handler, Method, is_nearest, is_used, search, stock

_BANDWIDTH = "get_num_quantizers_for_bandwidth"
# The names of the argument that selects the number of levels.
_SELECTORS = ("bandwidth", "num_quantizers", "n_q")


def levels_of(module: Any) -> Sequence[nn.Module]:
    """The quantizers of all levels, or nothing if the module is no such stack."""
    for name in ("layers", "quantizers"):
        layers = module._modules.get(name)
        if isinstance(layers, nn.ModuleList) and len(layers) and all(_codebook(each) is not None for each in layers):
            return list(layers)
    return []


def _codebook(level: nn.Module) -> Any:
    for name in ("codebook", "_codebook"):
        module = level._modules.get(name)
        if module is not None and has_codebook(module):
            return module
    return None


def searched(module: Any, x: Tensor, amount: Any = None, *_: Any, **kwargs: Any) -> tuple[Tensor, Sequence[Tensor]]:
    """The vectors [B T, D] of x [B, D, T] after a projection, and the codebooks of the levels that run."""
    amount = next(iter(kwargs.values()), amount)
    levels = levels_of(module)
    if hasattr(module, _BANDWIDTH):
        amount = getattr(module, _BANDWIDTH)(amount)
    elif amount is not None:
        amount = int(amount)
    if module._modules.get("input_proj") is not None:
        x = module.input_proj(x)
    vectors = x.transpose(1, 2).reshape(-1, x.shape[1])
    return vectors.detach(), [codebook_of(_codebook(level)) for level in levels[:amount]]


def in_one_operation(x: Tensor) -> bool:
    """Whether stacking the codebooks costs less than a search for each level: it saves launches on a GPU."""
    return x.is_cuda and x.dtype == torch.float32


def encode(module: Any, x: Tensor, amount: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """Indices [L, B, T] of all levels; the residual keeps the dtype of x, as in the class."""
    codebooks = [codebook_of(_codebook(level)) for level in levels_of(module)]
    if is_used(args) or len(kwargs) > 1 or any(each.is_meta for each in codebooks):
        return stock(module, "encode")(x, amount, *args, **kwargs)
    residual, used = searched(module, x, amount, **kwargs)
    if in_one_operation(residual):
        indices = residual_quantize(residual, torch.stack(list(used))).indices.T
    else:
        found = []
        for codebook in used:
            found.append(search(residual, codebook))
            residual = residual - embedding(found[-1], codebook)
        indices = torch.stack(found)
    return indices.reshape(len(used), len(x), -1)


def recognise(module: Any) -> Method | str | None:
    if not callable(getattr(type(module), "encode", None)) or not (levels := levels_of(module)):
        return None
    names = list(inspect.signature(type(module).encode).parameters)[1:]
    if len(names) > 1 and names[1] not in _SELECTORS:
        return f"its encode has an unknown argument {names[1]}"
    if any(any(True for _ in each.parameters()) for each in levels):
        return "its levels have projections; their searches are patched one by one"
    codebooks = [_codebook(level) for level in levels]
    for codebook in codebooks:
        bound = recognise_level(codebook)
        if not isinstance(bound, Method):
            return bound or "a level is not recognised"
    shapes = {tuple(codebook_of(codebook).shape) for codebook in codebooks}
    if len(shapes) > 1:
        return "its levels have codebooks of several sizes; their searches are patched one by one"
    first = codebook_of(codebooks[0])
    projection = module._modules.get("input_proj")
    num_features = first.shape[1] if projection is None else projection.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, num_features, 32, generator=generator).to(first) * first.float().std().to(first.dtype)
    indices = stock(module, "encode")(x)
    residual, used = searched(module, x)
    if not isinstance(indices, Tensor) or indices.shape != (len(used), 2, 32):
        return "its encode does not give indices of shape [L, B, T]"
    for codebook, level in zip(used, indices.flatten(1), strict=True):
        if not is_nearest(residual, codebook, level):
            return "its encode does not give the nearest codes of residuals"
        residual = residual - embedding(level, codebook)
    return Method(encode, module)


def tokens(indices: Tensor) -> Tensor:
    return indices.flatten(1).T


HANDLER = Handler("encode", "all levels in one method, in one operation on a GPU", recognise, searched, tokens)

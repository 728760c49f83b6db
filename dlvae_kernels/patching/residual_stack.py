"""`encode(x [B, D, T]) -> indices [L, B, T]` of a residual stack whose levels all have the search of `euclidean`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..functional.residual_quantize import residual_quantize
from .euclidean import codebook_of, has_codebook
from .euclidean import recognise as recognise_level
from .handler import Handler, Method, is_nearest, is_own, is_used, search, stock

_BANDWIDTH = "get_num_quantizers_for_bandwidth"
# The names of the argument that selects the number of levels.
_SELECTORS = ("bandwidth", "num_quantizers", "n_q")


def names_of(module: Any) -> tuple[str, str] | None:
    """The names of the list of levels, and of the codebook in each level; None if the module is no such stack."""
    for levels in ("layers", "quantizers"):
        for codebook in ("codebook", "_codebook"):
            found = [each._modules.get(codebook) for each in module._modules.get(levels) or ()]
            if found and all(each is not None and has_codebook(each) for each in found):
                return levels, codebook
    return None


def searched(
    module: Any, x: Tensor, amount: Any = None, *_: Any, levels: str, codebook: str, **kwargs: Any
) -> tuple[Tensor, Sequence[Tensor]]:
    """The vectors [B T, D] of x [B, D, T] after a projection, and the codebooks of the levels that run."""
    amount = next(iter(kwargs.values()), amount)
    if hasattr(module, _BANDWIDTH):
        amount = getattr(module, _BANDWIDTH)(amount)
    elif amount is not None:
        amount = int(amount)
    if module._modules.get("input_proj") is not None:
        x = module.input_proj(x)
    vectors = x.transpose(1, 2).reshape(-1, x.shape[1]).detach()
    return vectors, [codebook_of(getattr(level, codebook)) for level in getattr(module, levels)[:amount]]


def in_one_operation(x: Tensor) -> bool:
    """Whether stacking the codebooks costs less than a search for each level: it saves launches on a GPU."""
    return x.is_cuda and x.dtype == torch.float32


def encode(module: Any, x: Tensor, amount: Any = None, *args: Any, levels: str, codebook: str, **kwargs: Any) -> Tensor:
    """Indices [L, B, T] of all levels; the residual keeps the dtype of x, as in the class."""
    codebooks = [codebook_of(getattr(level, codebook)) for level in getattr(module, levels)]
    if is_used(args) or len(kwargs) > 1 or any(each.is_meta for each in codebooks):
        return stock(module, "encode")(x, *(() if amount is None else (amount,)), *args, **kwargs)
    residual, used = searched(module, x, amount, levels=levels, codebook=codebook, **kwargs)
    if in_one_operation(residual):
        indices = residual_quantize(residual, torch.stack(list(used))).indices.T
    else:
        found = []
        for codes in used:
            found.append(search(residual, codes))
            residual = residual - embedding(found[-1], codes)
        indices = torch.stack(found)
    return indices.reshape(len(used), len(x), -1)


def recognise(module: Any) -> Method | str | None:
    if not callable(getattr(type(module), "encode", None)) or (names := names_of(module)) is None:
        return None
    arguments = list(inspect.signature(type(module).encode).parameters)[1:]
    if len(arguments) > 1 and arguments[1] not in _SELECTORS:
        return f"its encode has an unknown argument {arguments[1]}"
    levels = getattr(module, names[0])
    if any(True for _ in levels.parameters()):
        return "its levels have projections; their searches are patched one by one"
    codebooks = [getattr(level, names[1]) for level in levels]
    for codebook in codebooks:
        if "quantize" in vars(codebook) and not is_own(codebook.quantize):
            return "the quantize of a level was replaced on the instance"
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
    method = Method(encode, module, levels=names[0], codebook=names[1])
    residual, used = searched(module, x, **method.keywords)
    if not isinstance(indices, Tensor) or indices.shape != (len(used), 2, 32):
        return "its encode does not give indices of shape [L, B, T]"
    for codes, level in zip(used, indices.flatten(1), strict=True):
        if not is_nearest(residual, codes, level):
            return "its encode does not give the nearest codes of residuals"
        residual = residual - embedding(level, codes)
    return method


def tokens(indices: Tensor) -> Tensor:
    return indices.flatten(1).T


HANDLER = Handler("encode", "all levels in one method, in one operation on a GPU", recognise, searched, tokens)

"""`quantize(x [N, D]) -> indices [N]`, the search of the EnCodec family, Mimi and MoMask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .handler import Handler, Method, is_nearest, is_used, sample, search, stock, unusable

_CACHE = "_embed"


def codebook_of(module: Any) -> Tensor:
    """The codebook [K, D] of a module. Mimi's is a quotient that its class caches, here for one dtype and device."""
    if "embed_sum" not in module._buffers:
        return module.embed if isinstance(getattr(module, "embed", None), Tensor) else module.codebook
    cached, total = getattr(module, _CACHE, None), module.embed_sum
    if cached is not None and (cached.device, cached.dtype) != (total.device, total.dtype):
        setattr(module, _CACHE, None)
    return module.embed


def drop_cache(module: Any, *_: Any) -> None:
    """Let a module that caches its codebook compute it again from weights that were loaded."""
    if _CACHE in module.__dict__:
        module.__dict__[_CACHE] = None


def quantize(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Index of the nearest code of each vector of x [N, D]; stock code where more is asked, such as a temperature."""
    codebook = codebook_of(module)
    if codebook.is_meta or is_used([*args, *kwargs.values()]):
        return stock(module, "quantize")(x, *args, **kwargs)
    return search(x, codebook)


def has_codebook(module: Any) -> bool:
    """Whether a module has the method and one of the codebooks that this handler knows."""
    state = {**module._buffers, **module._parameters}
    codebooks = [each for name in ("embed", "codebook", "embed_sum") if (each := state.get(name)) is not None]
    return callable(getattr(type(module), "quantize", None)) and bool(codebooks) and codebooks[0].ndim == 2


def recognise(module: Any) -> Method | str | None:
    if not has_codebook(module):
        return None
    state = {**module._buffers, **module._parameters}
    if any(value is not None and value.is_meta for value in state.values()):
        return "its codebook is on the meta device; load the weights first"
    try:
        codebook = codebook_of(module)
        if (reason := unusable(codebook)) is not None:
            return reason
        x = sample(codebook)
        if not is_nearest(x, codebook, stock(module, "quantize")(x)):
            return "its quantize does not give the nearest codes by Euclidean distance"
    finally:
        # Weights may be loaded, or change, after the model is patched.
        drop_cache(module)
    return Method(quantize, module)


def searched(module: Any, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Sequence[Tensor]]:
    return x, [codebook_of(module)]


def tokens(indices: Tensor) -> Tensor:
    return indices.reshape(-1, 1)


HANDLER = Handler("quantize", "exact search of the nearest code", recognise, searched, tokens)

"""`decode_latents(x [B, D, T])`, the cosine search of the DAC family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from .handler import Handler, Method, is_nearest, sample, search, stock, unusable


def searched(module: Any, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """The unit vectors [B T, D] of x [B, D, T], and the unit codes."""
    return normalize(x.transpose(1, 2).reshape(-1, x.shape[1])), [normalize(module.codebook.weight)]


def decode_latents(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The code of the largest cosine for each vector of x [B, D, T]: codes [B, D, T] and indices [B, T]."""
    if module.codebook.weight.is_meta or args or kwargs:
        return stock(module, "decode_latents")(x, *args, **kwargs)
    vectors, (codebook,) = searched(module, x)
    indices = search(vectors, codebook).view(len(x), -1)
    # The call of the module runs its hooks.
    return module.codebook(indices).transpose(1, 2), indices


def recognise(module: Any) -> Method | str | None:
    codebook = getattr(module, "codebook", None)
    if not callable(getattr(type(module), "decode_latents", None)) or not isinstance(codebook, nn.Embedding):
        return None
    if (reason := unusable(codebook.weight)) is not None:
        return reason
    x = sample(codebook.weight).view(2, 32, -1).transpose(1, 2)
    result = stock(module, "decode_latents")(x)
    if not isinstance(result, tuple) or len(result) != 2:
        return "its decode_latents returns more than codes and indices"
    vectors, (codes,) = searched(module, x)
    if not is_nearest(vectors, codes, result[1].reshape(-1)) or not result[0].equal(
        codebook(result[1]).transpose(1, 2)
    ):
        return "its decode_latents does not give the codes of the largest cosine"
    return Method(decode_latents, module)


def tokens(result: tuple[Tensor, Tensor]) -> Tensor:
    return result[1].reshape(-1, 1)


HANDLER = Handler("decode_latents", "exact search of the largest cosine", recognise, searched, tokens)

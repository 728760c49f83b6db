"""`forward(z [B, D, H, W]) -> indices [B, H, W]`, the largest inner product with the rows of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.topk_codes import topk_codes
from .handler import Handler, Method, sample, stock, unusable


def searched(module: Any, z: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    return z.flatten(2).transpose(1, 2).reshape(-1, z.shape[1]), [module.embedding.weight]


def forward(module: Any, z: Tensor) -> Tensor:
    """Index of the code of the largest inner product for each vector of z [B, D, H, W]."""
    if module.embedding.weight.is_meta:
        return stock(module, "forward")(z)
    x, (codebook,) = searched(module, z)
    indices = topk_codes(x.detach(), codebook.detach(), 1, metric="dot")[0]
    return indices.view(len(z), *z.shape[2:])


def recognise(module: Any) -> Method | str | None:
    layer = getattr(module, "embedding", None)
    if not isinstance(layer, nn.Linear) or [name for name, _ in module.named_parameters()] != ["embedding.weight"]:
        return None
    if (reason := unusable(layer.weight)) is not None:
        return reason
    x = sample(layer.weight)
    z = x.view(1, 8, 8, -1).movedim(-1, 1)
    try:
        indices = stock(module, "forward")(z)
    except Exception as error:
        return f"its forward does not run on a map: {type(error).__name__}"
    if not isinstance(indices, Tensor) or indices.shape != (1, 8, 8) or indices.dtype != torch.int64:
        return "its forward gives no map of indices"
    scores = x.double() @ layer.weight.double().T
    found = scores.gather(1, indices.view(-1, 1)).squeeze(1)
    tolerance = 16 * torch.finfo(x.dtype).eps * x.double().norm(dim=1) * layer.weight.double().norm(dim=1).max()
    if bool((found < scores.max(1).values - tolerance).any()):
        return "its forward does not give the codes of the largest inner product"
    return Method(forward, module)


def tokens(indices: Tensor) -> Tensor:
    return indices.reshape(-1, 1)


HANDLER = Handler("forward", "exact search of the largest inner product", recognise, searched, tokens, "dot")

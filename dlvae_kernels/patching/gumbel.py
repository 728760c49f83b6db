"""`forward(x [B, T, D]) -> codes, perplexity` of wav2vec 2.0's Gumbel quantizers, in eval."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.gather_codes import gather_codes
from .handler import Handler, Method, stock, unusable


def forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Codes of the largest logits [B, T, G d] and their perplexity; stock code in training, which samples.

    The codes are gathered, in place of a product of [B T, G V, d]; the perplexity needs counts, not one-hot vectors.
    """
    if module.training or module.codevectors.is_meta:
        return stock(module, "forward")(x, *args, **kwargs)
    mask = next(iter([*args, *kwargs.values()]), None)
    batch, length, _ = x.shape
    groups, size = module.num_groups, module.num_vars
    logits = module.weight_proj(x).view(batch * length, groups, size)
    indices = logits.argmax(-1)
    valid = torch.ones_like(indices) if mask is None else mask.flatten()[:, None].expand_as(indices).long()
    places = indices + torch.arange(groups, device=indices.device) * size
    counts = torch.zeros(groups * size, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(0, places.flatten(), valid.flatten())
    total = batch * length if mask is None else mask.sum()
    shares = (counts.view(1, groups, size) / total).to(logits.dtype)
    # The mean over one row of shares is the row.
    perplexity = module._compute_perplexity(shares)
    codes = gather_codes(module.codevectors.view(groups, size, -1), indices)
    return codes.view(batch, length, -1), perplexity


def recognise(module: Any) -> Method | str | None:
    codes = module._parameters.get("codevectors")
    if codes is None or not isinstance(getattr(module, "weight_proj", None), nn.Linear):
        return None
    if not all(hasattr(module, name) for name in ("num_groups", "num_vars", "_compute_perplexity")):
        return None
    if (reason := unusable(codes.flatten(0, 1))) is not None:
        return reason
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, module.weight_proj.in_features, generator=generator).to(codes)
    training, module.training = module.training, False
    try:
        expected, found = stock(module, "forward")(x), forward(module, x)
    finally:
        module.training = training
    tolerance = 8 * torch.finfo(codes.dtype).eps
    if not found[0].equal(expected[0]) or not torch.allclose(found[1], expected[1], rtol=tolerance):
        return "its forward does not give the codes of the largest logits and their perplexity"
    return Method(forward, module)


HANDLER = Handler("forward", "codes are gathered, in eval", recognise)

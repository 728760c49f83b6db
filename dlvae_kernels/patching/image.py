"""`forward(z [B, D, H, W])` of image quantizers with `embedding.weight`: taming-transformers and its descendants."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .handler import Handler, Method, is_used, sample, search, stock, unusable

# The result of each kind. "grid": indices alone, of maps or of [B, T, D, H, W]. "indices": quantized, loss, indices.
# "taming": quantized, loss, (None, None, indices). "losses": as taming, with a tuple of losses that eval leaves empty.
KINDS = ("indices", "taming", "losses", "grid")


def channels_last(z: Tensor) -> Tensor:
    return z.movedim(-3, -1).contiguous()


def searched(module: Any, z: Tensor, *_: Any, normalised: bool = False, **__: Any) -> tuple[Tensor, Sequence[Tensor]]:
    """The vectors [N, D] of z and the codes, both of unit length where the class compares them so."""
    vectors, codes = channels_last(z).flatten(0, -2), module.embedding.weight
    return (normalize(vectors, dim=-1), [normalize(codes, dim=-1)]) if normalised else (vectors, [codes])


def forward(module: Any, z: Tensor, *args: Any, kind: str, normalised: bool, in_training: bool, **kwargs: Any) -> Any:
    """The result of the class, from the exact nearest codes."""
    if (
        module.embedding.weight.is_meta
        or (module.training and not in_training)
        or getattr(module, "remap", None) is not None
        or is_used([*args, *kwargs.values()])
    ):
        return stock(module, "forward")(z, *args, **kwargs)
    x, (codebook,) = searched(module, z, normalised=normalised)
    indices = search(x, codebook)
    z = channels_last(z)
    if kind == "grid":
        return indices.view(z.shape[:-1])
    z = x.view(z.shape)
    codes = (codebook[indices] if normalised else module.embedding(indices)).view(z.shape)
    quantized = (z + (codes - z).detach()).movedim(-1, -3).contiguous()
    if kind == "losses":
        return quantized, (None, None, None, 0), (None, None, indices)
    commitment, fit = (codes.detach() - z).square().mean(), (codes - z.detach()).square().mean()
    # The published loss weighted the codebook term; `legacy=False` weights the commitment.
    loss = commitment + module.beta * fit if getattr(module, "legacy", True) else module.beta * commitment + fit
    if kind == "indices":
        return quantized, loss, indices
    if module.sane_index_shape:
        indices = indices.view(z.shape[:-1])
    return quantized, loss, (None, None, indices)


def recognise(module: Any) -> Method | str | None:
    embedding = getattr(module, "embedding", None)
    if not isinstance(embedding, nn.Embedding) or [name for name, _ in module.named_parameters()] != [
        "embedding.weight"
    ]:
        return None
    if (reason := unusable(embedding.weight)) is not None:
        return reason
    if getattr(module, "remap", None) is not None:
        return "it maps its indices to others (remap)"
    # The copy is compared in training mode too, which may change its buffers.
    probe = copy.deepcopy(module).float().requires_grad_()
    for kind in KINDS:
        for normalised in (False, True):
            in_eval, in_training = (same_results(probe.train(mode), kind, normalised) for mode in (False, True))
            if in_eval:
                return Method(forward, module, kind=kind, normalised=normalised, in_training=in_training)
    return "its forward returns other results than the kinds that are known, or from another search"


def same_results(module: Any, kind: str, normalised: bool) -> bool:
    """Whether this method and that of the class give the same results and gradients."""
    # A near-tie may differ in one of the samples.
    for seed in (0, 1):
        x = sample(module.embedding.weight, 64, seed)
        z = x.view(1, 8, 8, -1).movedim(-1, 1)
        for each in (z, z[:, None]) if kind == "grid" else (z,):
            try:
                expected = results(module, each, lambda z: stock(module, "forward")(z))
                found = results(
                    module, each, lambda z: forward(module, z, kind=kind, normalised=normalised, in_training=True)
                )
            except Exception:
                continue
            if len(expected) == len(found) and all(map(is_close, expected, found)):
                return True
    return False


def results(module: Any, z: Tensor, call: Any) -> list[Any]:
    """All values of a result in order, and the gradients of its differentiable ones."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        values = list(flattened(call(z)))
        total = sum(value.square().sum() for value in values if isinstance(value, Tensor) and value.requires_grad)
        if isinstance(total, Tensor):
            values += torch.autograd.grad(total, [z, module.embedding.weight], allow_unused=True)
    return values


def flattened(result: Any) -> Iterator[Any]:
    if isinstance(result, (tuple, list)):
        yield len(result)
        for each in result:
            yield from flattened(each)
    else:
        yield result


def is_close(expected: Any, found: Any) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return type(expected) is type(found) and expected == found
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    largest = expected.abs().max().item()
    return torch.allclose(expected.double(), found.double(), rtol=1e-3, atol=1e-4 * largest)


def tokens(result: Any) -> Tensor:
    """The indices [N, 1] of a result of any kind."""
    while not isinstance(result, Tensor):
        result = result[-1]
    return result.reshape(-1, 1)


HANDLER = Handler("forward", "exact search of the nearest code of a map", recognise, searched, tokens)

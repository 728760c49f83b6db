"""The interface of a handler, and the searches and checks that the handlers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ..functional.nearest_code import nearest_code

# A partial of a function of this package survives deepcopy and pickle, and stays bound to the copied module.
Method = partial


class Handler(NamedTuple):
    """A kind of method that is replaced.

    Fields:
        method: the name of the method.
        does: what the bound method does, for the report.
        recognise: gives the method to bind to a module; a text that says why a module of this kind is left alone; or
            None for any other module.
        search: for the arguments of a call, the vectors [N, D] and the codebooks of all levels; None where the method
            searches nothing.
        tokens: the indices [N, L] in the result of a call.
        metric: the metric of the search.
    """

    method: str
    does: str
    recognise: Callable[[nn.Module], Method | str | None]
    search: Callable[..., tuple[Tensor, Sequence[Tensor]]] | None = None
    tokens: Callable[[Any], Tensor] | None = None
    metric: str = "l2"


def search(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code, for any two floating dtypes: the values that both hold are compared exactly."""
    if codebook.dtype not in (x.dtype, torch.float32) or x.dtype.itemsize > codebook.dtype.itemsize:
        dtype = torch.promote_types(x.dtype, codebook.dtype)
        x, codebook = x.to(dtype), codebook.to(dtype)
    return nearest_code(x.detach(), codebook.detach())


def stock(module: nn.Module, method: str) -> Callable[..., Any]:
    """The method of the class, bound to the module."""
    return getattr(type(module), method).__get__(module, type(module))


def is_own(method: Any) -> bool:
    """Whether this package bound a method that stands on an instance."""
    return isinstance(method, Method) and getattr(method.func, "__module__", "").startswith(__package__)


def is_used(values: Sequence[Any]) -> bool:
    """Whether an optional argument has another value than None, False or zero."""
    return any(value is not None and value is not False and value != 0 for value in values)


def unusable(codebook: Tensor) -> str | None:
    """Why a codebook cannot be compared with a stock search, or None if it can."""
    if codebook.is_meta:
        return "its codebook is on the meta device; load the weights first"
    if not codebook.is_floating_point() or codebook.layout != torch.strided or codebook.is_mps:
        return f"its codebook is {codebook.layout} {codebook.dtype} on {codebook.device}, which no kernel reads"
    if len(codebook) > 1 and bool((codebook == codebook[:1]).all()):
        return "all its codes are equal; load the weights first"
    return None


def sample(codebook: Tensor, num_vectors: int = 64, seed: int = 0) -> Tensor:
    """Vectors [N, D] near the codes of a codebook; they leave the state of the random number generators unchanged."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(len(codebook), (num_vectors,), generator=generator).to(codebook.device)
    noise = torch.randn(num_vectors, codebook.shape[1], generator=generator).to(codebook)
    return codebook[codes].detach() + noise * codebook.detach().float().std(correction=0).to(codebook.dtype)


def squared_distance(x: Tensor, codes: Tensor) -> Tensor:
    return (x.double() - codes.double()).square().sum(-1)


def is_nearest(x: Tensor, codebook: Tensor, indices: Tensor) -> bool:
    """Whether a stock search gives the nearest codes, but for the rounding of distances in the dtype of x."""
    best = search(x, codebook)
    if indices.shape != best.shape or indices.dtype != best.dtype:
        return False
    if bool((indices < 0).any()) or bool((indices >= len(codebook)).any()):
        return False
    # The stock distance |x|^2 - 2 x c + |c|^2 is off by several roundings of its largest term.
    largest = x.double().square().sum(-1) + codebook.double().square().sum(-1).max()
    tolerance = 8 * max(torch.finfo(x.dtype).eps, 1e-6) * largest
    found = squared_distance(x, embedding(indices, codebook))
    return bool((found <= squared_distance(x, embedding(best, codebook)) + tolerance).all())

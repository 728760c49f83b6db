"""Compare stock and patched searches on the vectors of one run of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from .handler import Handler, Method, stock


class Comparison(NamedTuple):
    """The tokens of one kind of method in one run, and how many differ between the stock and the patched method.

    Where a token differs, `patched` counts those where a float64 search of the same vectors agrees with the patched
    method, and `stock` those where it agrees with the stock method. A vector whose first differing level is followed by
    others counts all of them: the levels after it quantize another residual.
    """

    method: str
    tokens: int
    differing: int
    patched: int
    stock: int

    def __str__(self) -> str:
        text = f"{self.method}: {self.differing} of {self.tokens} tokens differ from the stock search"
        if self.differing:
            text += f" ({self.differing / self.tokens:.2g}); float64 agrees with the patched method in {self.patched}"
            text += f", with the stock method in {self.stock}"
        return text


def compare(model: nn.Module, bound: Iterable[tuple[nn.Module, Handler, Method]], inputs: Any) -> list[Comparison]:
    """Run the stock model once; each of its searches also runs patched, on the same vectors."""
    counts: dict[str, Tensor] = {}
    bound = [each for each in bound if each[1].search is not None]
    for module, handler, method in bound:
        name = f"{type(module).__name__}.{handler.method}"
        counts.setdefault(name, torch.zeros(4, dtype=torch.int64))
        module.__dict__[handler.method] = _recorder(module, handler, method, counts[name])
    try:
        with torch.no_grad():
            run(model, inputs)
    finally:
        for module, handler, method in bound:
            module.__dict__[handler.method] = method
    return [Comparison(name, *each.tolist()) for name, each in counts.items()]


def run(model: nn.Module, inputs: Any) -> Any:
    """Call the inputs if they are callable, or the model with them: a tensor, a tuple, or a dictionary of names."""
    if callable(inputs):
        return inputs()
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _recorder(module: nn.Module, handler: Handler, method: Method, counts: Tensor) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = stock(module, handler.method)(*args, **kwargs)
        expected, found = (handler.tokens(each) for each in (result, method(*args, **kwargs)))  # type: ignore[misc]
        differs = expected != found
        rows = differs.any(1)
        counts[:2] += torch.tensor([differs.numel(), int(differs.sum())])
        if bool(rows.any()):
            x, codebooks = handler.search(module, *args, **method.keywords, **kwargs)  # type: ignore[misc]
            exact = float64_search(x[rows], codebooks, handler.metric)
            pair = [(differs[rows] & (tokens[rows] == exact)).sum() for tokens in (found, expected)]
            counts[2:] += torch.stack(pair).cpu()
        return result

    return call


def float64_search(x: Tensor, codebooks: Sequence[Tensor], metric: str) -> Tensor:
    """Indices [N, L] by all distances in float64, for few vectors; a residual keeps the dtype of x."""
    indices = []
    for codebook in codebooks:
        if metric == "dot":
            scores = x.double() @ codebook.double().T
        else:
            scores = -torch.stack([(row.double() - codebook.double()).square().sum(-1) for row in x])
        indices.append(scores.argmax(-1))
        x = x - embedding(indices[-1], codebook)
    return torch.stack(indices, 1)

"""Parameters and buffers of a module under names that its source gave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class StateNames(NamedTuple):
    """The names under which a module keeps its state; a dot leads to a child module.

    `initialised`: a bool buffer that tells whether the codebook has been initialised; None: it is, unless it is all 0.
    """

    codes: str = "codes"
    cluster_size: str = "cluster_size"
    embed_sum: str = "embed_sum"
    initialised: str | None = None


class _State(nn.Module):
    """Holds a tensor under a name with a dot."""

    def reset_parameters(self) -> None:
        """Do nothing: the enclosing module initialises it, and a model may reset its modules in any order."""


class WideState(nn.Module):
    """A module whose buffers, and the parameters in `_wide_parameters`, stay in float32 or wider.

    Half precision would lose counts and moving averages.
    """

    _wide_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WideState:
        before = {**dict(self.named_buffers()), **{name: lookup(self, name).data for name in self._wide_parameters}}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if (state := lookup(self, name)).dtype in (torch.float16, torch.bfloat16):
                wide = old.to(state.device, torch.float32)
                if isinstance(state, nn.Parameter):
                    state.data = wide
                else:
                    owner, _, leaf = name.rpartition(".")
                    setattr(self.get_submodule(owner), leaf, wide)
        return self


def register(module: nn.Module, name: str, tensor: Tensor, persistent: bool = True) -> None:
    """Register a parameter or buffer under a name; a dot leads to a child module."""
    path, _, leaf = name.rpartition(".")
    if path and path not in module._modules:
        module.add_module(path, _State())
    owner = module.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent)


def lookup(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a name."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def replace_rows(state: Tensor, which: Tensor, is_replaced: Tensor, values: Tensor) -> None:
    """Write values [..., M, D] over the rows `which` [..., M] of state [..., K, D] where `is_replaced`.

    A state [..., K] takes values that broadcast to [..., M].
    """
    dim = which.ndim - 1
    if state.ndim > which.ndim:
        which, is_replaced = which[..., None].expand_as(values), is_replaced[..., None]
    kept = state.gather(dim, which)
    state.scatter_(dim, which, torch.where(is_replaced, values.to(state.dtype), kept))

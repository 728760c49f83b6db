"""A hook on every operation that records allocations: tests assert with it that no N x K matrix is materialised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlvae_kernels.backends import choose


class Allocations(TorchDispatchMode):
    """While active, keeps the largest storage that an operation returned, in elements, and who returned it.

    It looks into the `dlvae::` operations, which reach it as one call; what a kernel of torch takes for itself and
    gives back is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operation, self.seen = 0, "nothing", set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        if func.namespace == "dlvae":
            with self:
                out = choose(func._opname, *args)(*args)
        else:
            out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            # The storage of a view is that of its base: an expanded tensor takes no more.
            if isinstance(each, torch.Tensor) and (size := each.untyped_storage().nbytes() // each.itemsize):
                self.elements, self.operation = max((self.elements, self.operation), (size, str(func)))
        return out


@contextmanager
def without_launching() -> Iterator[None]:
    """Triton's launchers allocate and launch nothing: what they would take on a GPU is seen without one."""
    from triton.runtime.jit import JITFunction

    from tools.offline import driver_of

    with driver_of(90), mock.patch.object(JITFunction, "run", return_value=None):
        yield

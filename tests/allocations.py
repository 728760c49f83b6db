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
    """While active, record the largest storage that an operation returned, in elements, and the name of the operation.

    The operations inside a `dlvae::` operation are recorded too. Memory that a kernel of torch allocates and frees
    internally is not.
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
            # A view has the storage of its base, so an expanded tensor needs no more memory.
            if isinstance(each, torch.Tensor) and (size := each.untyped_storage().nbytes() // each.itemsize):
                self.elements, self.operation = max((self.elements, self.operation), (size, str(func)))
        return out


@contextmanager
def without_launching() -> Iterator[None]:
    """Let Triton's launchers allocate but launch nothing, to record without a GPU what they allocate."""
    from triton.runtime.jit import JITFunction

    from tools.offline import driver_of

    with driver_of(90), mock.patch.object(JITFunction, "run", return_value=None):
        yield

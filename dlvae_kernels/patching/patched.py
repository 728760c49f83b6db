"""The result of `patch`: what was changed, what was left alone, and how to undo it."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from .handler import Handler, Method
from .verify import Comparison


class Change(NamedTuple):
    """One bound method; `hook` is what removes the hook that was registered with it, or None."""

    name: str
    module: nn.Module
    handler: Handler
    method: Method
    hook: Any


class Patched:
    """The result of `patch`, which describes it; `str` gives a report.

    Attributes:
        changes: what was bound: the name of the module in the model, the module, and the method.
        left_alone: for the name of each other module that looks like a quantizer, why it was left alone.
        comparisons: for each kind of method, what `verify` found.

    >>> patched = patch(torch.nn.Linear(2, 2))
    >>> print(patched)
    dlvae_kernels.patch: 0 methods replaced
    >>> patched.undo()
    """

    def __init__(self, changes: list[Change], left_alone: dict[str, str]) -> None:
        self.changes = changes
        self.left_alone = left_alone
        self.comparisons: list[Comparison] = []

    def undo(self) -> None:
        """Give the modules their own methods back; a method that was replaced again meanwhile stays."""
        while self.changes:
            change = self.changes.pop()
            if change.module.__dict__.get(change.handler.method) is change.method:
                del change.module.__dict__[change.handler.method]
            if change.hook is not None:
                change.hook.remove()

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        kinds = Counter(
            f"{type(each.module).__name__}.{each.handler.method}: {each.handler.does}" for each in self.changes
        )
        lines = [f"dlvae_kernels.patch: {len(self.changes)} methods replaced"]
        lines += [f"  {count} x {kind}" for kind, count in kinds.items()]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            reasons.setdefault(reason, []).append(name or "the model")
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  left alone: {', '.join(names[:3])}{more}: {reason}")
        return "\n".join([*lines, *(f"  verified: {each}" for each in self.comparisons)])

"""Checks that the quantizers here pass and those of vector-quantize-pytorch 1.32 fail."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest

Check = Callable[..., None]


class Mend(NamedTuple):
    """A check of a package with its options, and the error that vector-quantize-pytorch raises in it."""

    check: Check
    options: dict[str, Any]
    error: type[Exception]

    def __call__(self, package: ModuleType) -> None:
        self.check(package, **self.options)


class Mends:
    """Collects the checks of a module.

    A check is a function of the package, and of options where it is added with variants. It raises an AssertionError,
    or `error`, for the stock package; with a release that mends it the test of the stock package fails.
    """

    def __init__(self) -> None:
        self.found: list[Any] = []

    def __call__(self, error: type[Exception] = AssertionError, **variants: dict[str, Any]) -> Callable[[Check], Check]:
        def add(check: Check) -> Check:
            name = check.__name__.removeprefix("check_")
            for variant, options in (variants or {"": {}}).items():
                label = f"{name}-{variant}" if variant else name
                self.found.append(pytest.param(Mend(check, options, error), id=label))
            return check

        return add

"""Quantizers under the names, arguments and checkpoints of other libraries."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType

__all__ = ["Installation", "install"]

_NAME = "vector_quantize_pytorch"


class Installation:
    """The result of `install`; `undo()`, or leaving it as a context, restores the modules that were there before.

    >>> with install() as installation:
    ...     isinstance(installation, Installation)
    True
    """

    def __init__(self, previous: dict[str, ModuleType]) -> None:
        self._previous = previous

    def undo(self) -> None:
        """Restore the modules of before; names that were imported meanwhile stay as they are."""
        _put(self._previous)

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def install(*, replace: bool = False) -> Installation:
    """Let `import vector_quantize_pytorch` give the package of this name in `dlvae_kernels.compat`.

    This is for code that cannot be edited. It holds for the process, for the package and its modules
    (`vector_quantize_pytorch.residual_vq`), and whether the real package is installed or not. A second call changes
    nothing.

    Args:
        replace: install although the real package has been imported. Names that other modules have imported from it
            stay those of the real package.
    Returns:
        an object whose `undo()` restores the modules of before; also a context manager.
    Raises:
        RuntimeError: the real package has been imported, and replace is False.

    >>> with install():
    ...     from vector_quantize_pytorch import SimVQ
    >>> SimVQ.__module__
    'dlvae_kernels.compat.vector_quantize_pytorch.sim_vq'
    """
    package = importlib.import_module(f"{__name__}.{_NAME}")
    previous = _installed()
    if previous.get(_NAME, package) is not package and not replace:
        raise RuntimeError(
            f"expected install() before the first import of {_NAME}, got the package of"
            f" {getattr(previous[_NAME], '__file__', None)}; call install() earlier, or pass replace=True, which leaves"
            " names that were imported from it as they are"
        )
    stems = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = {f"{_NAME}.{stem}": importlib.import_module(f"{package.__name__}.{stem}") for stem in stems}
    _put({_NAME: package, **modules})
    return Installation(previous)


def _installed() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name == _NAME or name.startswith(f"{_NAME}.")}


def _put(modules: dict[str, ModuleType]) -> None:
    for name in _installed():
        del sys.modules[name]
    sys.modules.update(modules)

"""Imports go down only: report -> training -> networks -> compat -> layers -> functional -> ops -> backends."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lower may not import higher. A module that is not listed belongs to its nearest listed parent.
LEVELS = {
    "dlvae_kernels.backends": 0,
    "dlvae_kernels.ops": 1,
    "dlvae_kernels.functional": 2,
    "dlvae_kernels.layers": 3,
    "dlvae_kernels.compat": 4,
    "dlvae_kernels.patching": 4,
    "dlvae_kernels.testing": 4,
    "dlvae_kernels": 4,
    "tools": 4,
    # The networks; models.train is the command that trains and reports.
    "models": 5,
    "models.training": 6,
    "models.report": 7,
    "models.train": 8,
    "examples": 8,
    "tests.oracles": 8,
    "benchmarks": 9,
    "tests": 10,
}
TRITON = "dlvae_kernels.backends.triton"
OWN = ("dlvae_kernels", "models", "examples", "benchmarks", "tools", "tests")

pytestmark = pytest.mark.small


def modules() -> dict[str, Path]:
    files = (file for name in OWN[:-1] for file in (ROOT / name).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def imported(name: str, file: Path) -> set[str]:
    """Absolute names of all modules that a file imports, at its top or within a function."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} if node.module is None else {module}
    return found


def level(module: str) -> int:
    while module not in LEVELS:
        module = module.rpartition(".")[0]
    return LEVELS[module]


@pytest.mark.parametrize(("name", "file"), modules().items())
def test_module_imports_go_down(name, file):
    for target in imported(name, file):
        if target.split(".")[0] in OWN:
            assert level(target) <= level(name), f"{name} imports {target}"


@pytest.mark.parametrize(("name", "file"), modules().items())
def test_backend_imports_no_other_backend(name, file):
    top = {target.split(".")[0] for target in imported(name, file)}
    if not name.startswith(("dlvae_kernels.backends.triton", "benchmarks.ceilings", "tools.")):
        assert "triton" not in top
    if name.startswith("dlvae_kernels.backends."):
        backend = ".".join(name.split(".")[:3])
        own = {target for target in imported(name, file) if target.startswith("dlvae_kernels")}
        assert all(target.startswith(backend) for target in own), f"{name} imports {own}"
    if name.startswith("dlvae_kernels.backends.reference"):
        assert top <= {"torch", "__future__", "collections", "typing", "dlvae_kernels"}


def triton_level(name: str) -> int:
    """The level of a module of the Triton backend: shared code, then families of helpers, then operations."""
    rest = name.removeprefix(TRITON).lstrip(".").split(".")
    if rest[0] in ("architectures", "language"):
        return 0
    # The families are folders; the operations are files.
    return 1 if (ROOT / "dlvae_kernels/backends/triton" / rest[0]).is_dir() else 2


@pytest.mark.parametrize(("name", "file"), [each for each in modules().items() if each[0].startswith(f"{TRITON}.")])
def test_triton_imports_go_from_operations_to_helpers(name, file):
    own = [target for target in imported(name, file) if target.startswith(f"{TRITON}.")]
    for target in own:
        assert triton_level(target) <= triton_level(name), f"{name} imports {target}"
    if name == f"{TRITON}.operations":
        assert own == [f"{TRITON}.topk"], "operations.py loads kernels when they first run"


def test_triton_modules_are_not_replaced_by_functions():
    code = f"""
import importlib, pkgutil, types
package = importlib.import_module("{TRITON}")
names = [each.name for each in pkgutil.walk_packages(package.__path__, "{TRITON}.")]
from {TRITON} import operations
for name in operations._FILES:
    getattr(operations, name)
for name in names:
    importlib.import_module(name)
for name in names:
    parent, _, own = name.rpartition(".")
    assert isinstance(getattr(importlib.import_module(parent), own), types.ModuleType), name
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_imported_nested_and_relative_imports_are_found(tmp_path):
    file = tmp_path / "nearest_code.py"
    file.write_text(
        "import a.b\nfrom .. import ops\nfrom ..layers.maps import x\ndef f():\n    from models import build\n"
    )
    names = imported("dlvae_kernels.functional.nearest_code", file)
    assert names == {"a.b", "dlvae_kernels.ops", "dlvae_kernels.layers.maps", "models"}

"""Imports go down only: models -> layers -> functional -> ops -> backends."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lower may not import higher. A module that is not listed belongs to its nearest listed parent.
LEVELS = {
    "dlvae_kernels.backends": 0,
    "dlvae_kernels.ops": 1,
    "dlvae_kernels.functional": 2,
    "dlvae_kernels.layers": 3,
    "dlvae_kernels.testing": 4,
    "dlvae_kernels": 4,
    "tools": 4,
    "models": 5,
    "tests.oracles": 5,
    "benchmarks": 6,
    "tests": 7,
}
OWN = ("dlvae_kernels", "models", "benchmarks", "tools", "tests")

pytestmark = pytest.mark.small


def modules() -> dict[str, Path]:
    files = (file for name in OWN[:-1] for file in (ROOT / name).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


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
    if not name.startswith(("dlvae_kernels.backends.triton", "benchmarks.ceilings", "tools.offline")):
        assert "triton" not in top
    if name.startswith("dlvae_kernels.backends."):
        backend = ".".join(name.split(".")[:3])
        own = {target for target in imported(name, file) if target.startswith("dlvae_kernels")}
        assert all(target.startswith(backend) for target in own), f"{name} imports {own}"
    if name.startswith("dlvae_kernels.backends.reference"):
        assert top <= {"torch", "__future__", "collections", "typing", "dlvae_kernels"}


def test_imported_nested_and_relative_imports_are_found(tmp_path):
    file = tmp_path / "nearest_code.py"
    file.write_text(
        "import a.b\nfrom .. import ops\nfrom ..layers.maps import x\ndef f():\n    from models import data\n"
    )
    names = imported("dlvae_kernels.functional.nearest_code", file)
    assert names == {"a.b", "dlvae_kernels.ops", "dlvae_kernels.layers.maps", "models"}

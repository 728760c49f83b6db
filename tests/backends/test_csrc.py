"""The sources of csrc: kernels under the sanitizers, file names, and the schemas of the operations."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dlvae_kernels import ops
from dlvae_kernels.backends import native

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("make", "g++") if shutil.which(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)}")
def test_kernels_under_sanitizers():
    result = subprocess.run(["make", "-j2", "test-asan"], cwd=ROOT, capture_output=True, text=True)
    if "cannot find -lasan" in result.stderr or "cannot find -lubsan" in result.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "portable: ok" in result.stdout
    assert "error" not in result.stderr


def test_kernels_use_nothing_that_instruction_sets_would_share():
    """The linker keeps one copy of an inline function of a library, perhaps one that this processor cannot run."""
    for file in (ROOT / "csrc/cpu/kernels").glob("*.h"):
        included = {line.split()[1] for line in file.read_text().splitlines() if line.startswith("#include")}
        assert {name for name in included if name[0] == "<"} <= {"<stdint.h>", "<string.h>", "<immintrin.h>"}, file
        assert "std::" not in file.read_text(), file


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cpu/isa").glob("*.cpp")), ids=lambda source: source.stem)
def test_clang_compiles_each_instruction_set_without_warnings(source):
    """Clang rejects an intrinsic of another instruction set only when it generates machine code."""
    clang(["-O0", "-c", "-o", "/dev/null", str(source)])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
def test_clang_compiles_the_wrappers_of_the_operations_without_warnings():
    sources = [str(file) for pattern in ("csrc/*.cpp", "csrc/cpu/*.cpp") for file in ROOT.glob(pattern)]
    include = Path(torch.__file__).parent / "include"
    clang(["-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{include}", *sources])


def clang(words: list[str]) -> None:
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-warning-option"]
    result = subprocess.run(["clang++", *options, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def test_csrc_file_names_tell_where_a_file_is():
    """A name stands in one folder: an error message or an editor's tab that shows it alone is unambiguous."""
    folders: dict[str, set[Path]] = {}
    for file in (ROOT / "csrc").rglob("*.*"):
        folders.setdefault(file.stem, set()).add(file.parent)
    assert {stem: paths for stem, paths in folders.items() if len(paths) > 1} == {}


def described(namespace: str, op: str) -> list[tuple[object, ...]]:
    """The arguments and then the results of an operation: name, type, default, kind and what it writes to."""
    schema = getattr(getattr(torch.ops, namespace), op).default._schema
    alias = [each.alias_info and (each.alias_info.is_write, each.alias_info.before_set) for each in schema.arguments]
    arguments = [(each.name, str(each.type), each.default_value, each.kwarg_only) for each in schema.arguments]
    results = [(each.name, str(each.type), each.alias_info) for each in schema.returns]
    return [*zip(arguments, alias, strict=True), *results]


@pytest.mark.skipif(
    native.library_unavailable_reason() is not None, reason=f"native: {native.library_unavailable_reason()}"
)
def test_schemas_of_python_and_cpp_are_equal():
    names = {operation.schema.partition("(")[0] for operation in ops.OPERATIONS}
    native_names = {
        name.removeprefix("dlvae_native::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dlvae_native::")
    }
    assert native_names == names | {"uncertain_rows", "cpu_name", "cpu_names", "search_rate"}
    for name in names:
        assert described("dlvae_native", name) == described("dlvae", name), name

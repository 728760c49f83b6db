"""The compiled backend: how it is built and found, and why it cannot run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dlvae_kernels import BackendUnavailable, nearest_code, use_backend
from dlvae_kernels.backends import native, unavailable_reason

ROOT = Path(__file__).parents[2]
X, CODEBOOK = torch.zeros(2, 3), torch.zeros(4, 3)
BUILD = ("setup.py", "--quiet", "build_ext", "--inplace")
# In place of csrc, to see how a build goes without waiting for it.
FINE, BROKEN = "int dlvae_nothing() { return 0; }\n", "int dlvae_nothing( { return 0; }\n"

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
needs_kernel = pytest.mark.skipif(
    unavailable_reason("native", "nearest_code") is not None,
    reason=f"native: {unavailable_reason('native', 'nearest_code')}",
)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, without a built library."""
    for name in ("csrc", "dlvae_kernels"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.reason.txt")
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def with_source(checkout: Path, text: str) -> Path:
    shutil.rmtree(checkout / "csrc")
    (checkout / "csrc").mkdir()
    (checkout / "csrc" / "library.cpp").write_text(text)
    return checkout


def python(folder: Path, *words: str, compiler: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """Run Python in a folder, by default where a compiler may be found."""
    dropped = ("CC", "CXX", "DLVAE_BUILD_EXT", "DLVAE_CUDA_ARCHS", "DLVAE_BACKEND", "DLVAE_CPU")
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | variables
    if not compiler:
        environment["PATH"] = str(folder / "nothing")
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def library(folder: Path) -> Path:
    return folder / "dlvae_kernels" / "native_cpu.abi3.so"


def reason(folder: Path) -> Path:
    return folder / "dlvae_kernels" / "native_cpu.reason.txt"


def cuda_reason(folder: Path) -> Path:
    return folder / "dlvae_kernels" / "native_cuda.reason.txt"


def test_build_without_compiler_makes_a_pure_package_that_works(checkout):
    library(checkout).touch()
    built = python(checkout, *BUILD, compiler=False)
    assert built.returncode == 0, built.stderr
    why = "the C++ library was not built: no C++ compiler (looked for c++, g++, clang++)"
    assert why in built.stderr
    assert not library(checkout).exists()
    assert cuda_reason(checkout).read_text() == reason(checkout).read_text()
    table = python(checkout, "-m", "dlvae_kernels", compiler=False).stdout
    assert f"native, all: {why}\n" in table
    assert "instruction set of the C++ kernels: none" in table
    code = """
import torch, dlvae_kernels as d
x, codebook = torch.randn(9, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
out = d.vector_quantize(x, codebook)
(out.codebook_loss + out.commitment_loss).backward()
assert x.grad.abs().sum() > 0 and d.topk_codes(x, codebook, 2)[0].shape == (9, 2)
with d.use_backend("native"):
    d.nearest_code(x, codebook)
"""
    result = python(checkout, "-c", code, compiler=False)
    assert f"BackendUnavailable: nearest_code: backend 'native' is forced, but {why}" in result.stderr


def test_wheel_without_compiler_is_for_any_machine(checkout):
    built = python(checkout, "setup.py", "--quiet", "sdist", "bdist_wheel", compiler=False)
    assert built.returncode == 0, built.stderr
    [wheel] = (checkout / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dlvae_kernels/native_cpu.reason.txt" in names
    assert not [name for name in names if name.startswith("csrc") or name.endswith(".so")]
    [source] = (checkout / "dist").glob("*.tar.gz")
    shutil.unpack_archive(source, checkout / "unpacked")
    [unpacked] = (checkout / "unpacked").iterdir()
    assert {path.relative_to(unpacked) for path in (unpacked / "csrc").rglob("*")} == {
        path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*")
    }


@needs_compiler
def test_wheel_with_library_is_for_every_python(checkout):
    built = python(with_source(checkout, FINE), "setup.py", "--quiet", "bdist_wheel")
    assert built.returncode == 0, built.stderr
    [wheel] = (checkout / "dist").glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "dlvae_kernels/native_cpu.abi3.so" in names
    assert "dlvae_kernels/native_cpu.reason.txt" not in names


@needs_compiler
def test_build_broken_source_leaves_the_reason_and_fine_source_the_library(checkout):
    with_source(checkout, BROKEN)
    built = python(checkout, *BUILD)
    assert built.returncode == 0, built.stderr
    text = reason(checkout).read_text()
    assert text.startswith("the compiler failed (`pip install -v` shows all that it says):\n")
    assert "error: " in text
    assert "error: " in built.stdout
    assert len(text.splitlines()) < 12
    (checkout / "csrc" / "library.cpp").write_text(FINE)
    assert python(checkout, *BUILD).returncode == 0
    assert library(checkout).exists()
    assert not reason(checkout).exists()
    (checkout / "csrc" / "library.cpp").write_text(BROKEN)
    assert python(checkout, *BUILD).returncode == 0
    assert not library(checkout).exists()
    assert reason(checkout).exists()


@needs_compiler
@pytest.mark.skipif(torch.version.cuda is None or shutil.which("nvcc") is None, reason="no nvcc, or no CUDA torch")
def test_build_broken_cuda_source_leaves_its_own_reason(checkout):
    cuda = with_source(checkout, FINE) / "csrc" / "cuda"
    cuda.mkdir()
    (cuda / "nothing.cu").write_text(BROKEN)
    assert python(checkout, *BUILD, DLVAE_CUDA_ARCHS="90").returncode == 0
    assert library(checkout).exists()
    assert "error: " in cuda_reason(checkout).read_text()
    fatal = python(checkout, *BUILD, DLVAE_CUDA_ARCHS="90", DLVAE_BUILD_EXT="1")
    assert "error: DLVAE_BUILD_EXT=1, and the CUDA library was not built: the compiler failed" in fatal.stderr
    (cuda / "nothing.cu").write_text(FINE)
    assert python(checkout, *BUILD, DLVAE_CUDA_ARCHS="90").returncode == 0
    assert (checkout / "dlvae_kernels" / "native_cuda.abi3.so").exists()
    assert not cuda_reason(checkout).exists()
    if not torch.cuda.is_available():
        assert python(checkout, *BUILD).returncode == 0
        assert "DLVAE_CUDA_ARCHS names none" in cuda_reason(checkout).read_text()


def test_build_dlvae_build_ext_value_is_followed(checkout):
    fatal = python(checkout, *BUILD, compiler=False, DLVAE_BUILD_EXT="1")
    assert fatal.returncode != 0
    assert "error: DLVAE_BUILD_EXT=1, and the C++ library was not built: no C++ compiler" in fatal.stderr
    assert python(checkout, *BUILD, DLVAE_BUILD_EXT="0").returncode == 0
    assert reason(checkout).read_text() == "DLVAE_BUILD_EXT=0 was set\n"
    unknown = python(checkout, *BUILD, DLVAE_BUILD_EXT="yes")
    assert "DLVAE_BUILD_EXT is 'yes'; it needs to be 0, 1 or unset" in unknown.stderr
    named = python(checkout, *BUILD, CXX="no-such-compiler -m64")
    assert "no C++ compiler (looked for no-such-compiler -m64)" in named.stderr


@pytest.mark.parametrize(
    ("module", "extensions", "why"),
    [
        ("raise ImportError('no libcudart')", None, "torch cannot be imported (no libcudart); pip needs --no-build"),
        (
            "__version__ = '2.9.1+cpu'",
            "from setuptools import Extension as CppExtension\n"
            "from setuptools.command.build_ext import build_ext as BuildExtension\n",
            "torch 2.9.1+cpu was installed, and it needs 2.10 or newer\n",
        ),
    ],
)
def test_build_without_usable_torch_states_reason(checkout, module, extensions, why):
    (checkout / "torch" / "utils").mkdir(parents=True)
    (checkout / "torch" / "__init__.py").write_text(module)
    if extensions is not None:
        (checkout / "torch" / "utils" / "cpp_extension.py").write_text(extensions)
    built = python(checkout, *BUILD, PYTHONPATH=str(checkout))
    assert built.returncode == 0, built.stderr
    assert reason(checkout).read_text().startswith(why)


def test_library_unavailable_reason_library_absent_or_broken_states_it(monkeypatch, tmp_path):
    load = native.library_unavailable_reason.__wrapped__
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "native_cpu.abi3.so")
    monkeypatch.setattr(native, "_REASON", tmp_path / "native_cpu.reason.txt")
    assert load() == "the C++ library was not built: setup.py has not run here"
    native._REASON.write_text("no C++ compiler\n")
    assert load() == "the C++ library was not built: no C++ compiler"
    native._LIBRARY.write_text("no library")
    assert load().startswith("the C++ library does not load: ")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert load() == "the C++ library requires torch 2.10 or newer, got 2.9.1+cpu"


def test_library_before_first_use_is_not_loaded():
    code = """
import torch, dlvae_kernels
from pathlib import Path
is_loaded = lambda: "native_cpu" in Path("/proc/self/maps").read_text()
assert not is_loaded()
dlvae_kernels.nearest_code(torch.zeros(2, 3), torch.zeros(4, 3))
print(is_loaded())
"""
    result = python(ROOT, "-c", code)
    assert result.stdout == f"{library(ROOT).exists()}\n", result.stderr


@needs_kernel
def test_unavailable_reason_unsupported_arguments_states_reason():
    assert "no kernel for faiss" in unavailable_reason("native", "faiss")
    assert unavailable_reason("native", "nearest_code", X, CODEBOOK, False, "float32") is None
    assert "the tensors are on meta" in unavailable_reason("native", "nearest_code", X.to("meta"), CODEBOOK)
    assert "no kernel for torch.float64" in unavailable_reason("native", "nearest_code", X.double(), CODEBOOK.double())
    with use_backend("native"), pytest.raises(BackendUnavailable) as caught:
        nearest_code(X.double(), CODEBOOK.double())
    assert str(caught.value) == (
        "nearest_code: backend 'native' is forced, but it has no kernel for torch.float64;"
        ' pass float32 inputs or use_backend("reference")'
    )
    assert nearest_code(X.double(), CODEBOOK.double()).tolist() == [0, 0]


@needs_kernel
def test_dlvae_cpu_changed_between_calls_is_read_at_each_call(monkeypatch):
    names = native.instruction_sets()
    assert names[-1] == "portable"
    for name in names:
        monkeypatch.setenv("DLVAE_CPU", name)
        assert torch.ops.dlvae_native.cpu_name() == native.instruction_set() == name
        with use_backend("native"):
            assert nearest_code(X, CODEBOOK).tolist() == [0, 0]
    for unset in (lambda: monkeypatch.setenv("DLVAE_CPU", ""), lambda: monkeypatch.delenv("DLVAE_CPU")):
        unset()
        assert torch.ops.dlvae_native.cpu_name() == native.instruction_set() == names[0]


@needs_kernel
def test_dlvae_cpu_unknown_or_absent_instruction_set_raises(monkeypatch):
    known = ", ".join(native.instruction_sets(everywhere=True))
    monkeypatch.setenv("DLVAE_CPU", "avx3")
    with pytest.raises(ValueError, match=f"expected DLVAE_CPU to be one of {known}, or unset, got 'avx3'"):
        nearest_code(X, CODEBOOK)
    with pytest.raises(RuntimeError, match=f"expected DLVAE_CPU to be one of {known}, got 'avx3'"):
        torch.ops.dlvae_native.cpu_name()
    monkeypatch.setattr(
        native, "instruction_sets", lambda everywhere=False: ["neon", "sve"] if everywhere else ["neon"]
    )
    monkeypatch.setenv("DLVAE_CPU", "sve")
    assert (
        unavailable_reason("native", "nearest_code", X) == "DLVAE_CPU is 'sve', which this processor lacks; it has neon"
    )
    with pytest.raises(BackendUnavailable, match="lacks; it has neon; set DLVAE_CPU to one of these"):
        nearest_code(X, CODEBOOK)


@needs_kernel
def test_main_native_library_prints_the_instruction_set():
    first, *others = native.instruction_sets()
    line = f"instruction set of the C++ kernels: {first}"
    assert line in python(ROOT, "-m", "dlvae_kernels").stdout
    for name in others:
        table = python(ROOT, "-m", "dlvae_kernels", DLVAE_CPU=name).stdout
        assert f"instruction set of the C++ kernels: {name} (DLVAE_CPU can select {first}" in table

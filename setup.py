"""Build csrc if torch and a C++ compiler are available; otherwise the package is pure Python and contains the reason.

csrc/cuda is built if a CUDA build of torch and nvcc are available too, for the GPUs of this machine or those that
DLVAE_CUDA_ARCHS names ("80 90", or "all"). DLVAE_BUILD_EXT=1 makes a failure fatal, DLVAE_BUILD_EXT=0 builds nothing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    NO_TORCH = None
except Exception as error:
    from setuptools import Extension as CppExtension
    from setuptools.command.build_ext import build_ext as BuildExtension

    NO_TORCH = f"torch cannot be imported ({error}); pip needs --no-build-isolation to see the one that is installed"

ROOT = Path(__file__).parent
CPU, CUDA = "native_cpu", "native_cuda"
ALL_ARCHS = ["80", "86", "89", "90", "100", "120"]
WANTED = os.environ.get("DLVAE_BUILD_EXT", "")
TARGET = "0x020a000000000000"
COMPILERS = ("c++", "g++", "clang++")
# Parameters are unused in torch's headers and on some instruction sets; GCC's own headers read uninitialised registers.
WARNINGS = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option")


def files(*patterns: str) -> list[str]:
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def native_cpu() -> CppExtension:
    return CppExtension(
        "dlvae_kernels.native_cpu",
        files("csrc/*.cpp", "csrc/cpu/**/*.cpp"),
        depends=files("csrc/*.h", "csrc/cpu/**/*.h"),
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TARGET)],
        extra_compile_args=["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", *WARNINGS],
    )


def unavailable_reason() -> str | None:
    """The reason why csrc cannot be built here, or None."""
    if WANTED == "0":
        return "DLVAE_BUILD_EXT=0 was set"
    if NO_TORCH is not None:
        return NO_TORCH
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} was installed, and it needs 2.10 or newer"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    found = [name for name in names if shutil.which(shlex.split(name)[0])]
    if not found:
        return f"no C++ compiler (looked for {', '.join(names)})"
    # torch compiles with this compiler, setuptools links with it.
    os.environ["CXX"] = found[0]
    return None


def nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(filter(None, (shutil.which(f"{home}/bin/nvcc") for home in homes)), None)


def cuda_archs() -> list[str]:
    """The architectures in DLVAE_CUDA_ARCHS, or those of the GPUs of this machine."""
    if named := os.environ.get("DLVAE_CUDA_ARCHS", "").split():
        return ALL_ARCHS if named == ["all"] else named
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(found) if major >= 8]


def cuda_unavailable_reason() -> str | None:
    """The reason why csrc/cuda cannot be built although csrc/cpu can, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was installed, which has no CUDA"
    if nvcc() is None:
        return "no nvcc (looked on PATH, in $CUDA_HOME and in /usr/local/cuda)"
    if not cuda_archs():
        return "no GPU of compute capability 8.0 or newer is here, and DLVAE_CUDA_ARCHS names none"
    return None


def build_cuda(library: Path) -> None:
    """Build one library for all versions of torch: its CUDA runtime is its own, and libtorch loads libtorch_cuda."""
    archs, folder = cuda_archs(), Path(torch.__file__).parent
    words = [nvcc(), "-O3", "-std=c++17", "--threads=0", "-shared", f"-DTORCH_TARGET_VERSION={TARGET}"]
    words += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    words += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    words += [f"-isystem={folder}/include", *files("csrc/cuda/*.cu", "csrc/cuda/*.cpp"), "-o", str(library)]
    words += ["-Xlinker=--no-as-needed", f"-L{folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(words, cwd=ROOT, check=True)


@contextmanager
def overheard() -> Iterator[list[str]]:
    """Collect the lines that this process and its children print, and print them as usual."""
    lines: list[str] = []
    sys.stdout.flush()
    streams = {number: os.dup(number) for number in (1, 2)}
    source, sink = os.pipe()

    def copy() -> None:
        with os.fdopen(source, "rb") as pipe:
            for line in pipe:
                os.write(streams[1], line)
                lines.append(line.decode(errors="replace").rstrip())

    listener = threading.Thread(target=copy)
    listener.start()
    for number in streams:
        os.dup2(sink, number)
    os.close(sink)
    try:
        yield lines
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, stream in streams.items():
            os.dup2(stream, number)
        listener.join()
        for stream in streams.values():
            os.close(stream)


def attempt(build: Callable[[], None]) -> str | None:
    """Run a build; return the reason of its failure, or None."""
    try:
        with overheard() as lines:
            build()
    except (Exception, SystemExit) as error:
        # This leaves out commands, which are long.
        last = [line for line in lines if line and len(line) < 300][-8:] or [str(error)]
        return "\n  ".join(["the compiler failed (`pip install -v` shows all that it says):", *last])
    return None


def leave(folder: Path, name: str, reason: str | None) -> None:
    """Write the reason in place of a library that was not built, or remove the old reason."""
    if reason is None:
        (folder / f"{name}.reason.txt").unlink(missing_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.abi3.so").unlink(missing_ok=True)
        (folder / f"{name}.reason.txt").write_text(reason + "\n")


class BuildOrSayWhy(BuildExtension):
    """Leaves either each library or the reason why it is missing."""

    def run(self) -> None:
        # setuptools resets `inplace` during the build.
        folders = [folder / "dlvae_kernels" for folder in (Path(self.build_lib), *([ROOT] if self.inplace else []))]
        reason = unavailable_reason() or attempt(super().run)
        if reason is not None and WANTED == "1":
            sys.exit(f"error: DLVAE_BUILD_EXT=1, and the C++ library was not built: {reason}")
        cuda_reason = reason or self._build_cuda(folders)
        for folder in folders:
            leave(folder, CPU, reason)
            leave(folder, CUDA, cuda_reason)
        if reason is not None:
            print(f"warning: the package is pure Python, the C++ library was not built: {reason}", file=sys.stderr)
            self.extensions = self.distribution.ext_modules = []

    def _build_cuda(self, folders: list[Path]) -> str | None:
        library, *copies = [folder / f"{CUDA}.abi3.so" for folder in folders]
        reason = cuda_unavailable_reason() or attempt(lambda: build_cuda(library))
        if reason is not None and WANTED == "1" and os.environ.get("DLVAE_CUDA_ARCHS"):
            sys.exit(f"error: DLVAE_BUILD_EXT=1, and the CUDA library was not built: {reason}")
        for copy in copies if reason is None else []:
            shutil.copy(library, copy)
        return reason


class Wheel(bdist_wheel):
    """A wheel without the library is pure Python, for any machine."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            self.root_is_pure = not self.distribution.has_ext_modules()


if WANTED not in ("", "0", "1"):
    sys.exit(f"error: DLVAE_BUILD_EXT is {WANTED!r}; it needs to be 0, 1 or unset")
setup(
    ext_modules=[native_cpu()],
    cmdclass={"build_ext": BuildOrSayWhy, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

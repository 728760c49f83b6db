"""Builds csrc where torch and a C++ compiler are at hand; without them the package is pure Python, and says why.

DLVAE_BUILD_EXT=1 makes a failure fatal, DLVAE_BUILD_EXT=0 builds nothing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
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
LIBRARY, REASON = "native_cpu.abi3.so", "native_cpu.reason.txt"
WANTED = os.environ.get("DLVAE_BUILD_EXT", "")
COMPILERS = ("c++", "g++", "clang++")
# Parameters are unused in torch's headers and on some instruction sets; registers lack a value in GCC's own headers.
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
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++17",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
        ],
    )


def why_not() -> str | None:
    """Why csrc cannot be built here, or None."""
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
    # torch compiles by this name, setuptools links by it.
    os.environ["CXX"] = found[0]
    return None


@contextmanager
def overheard() -> Iterator[list[str]]:
    """The lines that this process and its children print, which are printed all the same."""
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


class BuildOrSayWhy(BuildExtension):
    """Leaves either the library or the reason why there is none."""

    def run(self) -> None:
        reason = why_not()
        # Before setuptools changes its mind about --inplace.
        folders = [Path(self.build_lib), *([ROOT] if self.inplace else [])]
        if reason is None:
            try:
                with overheard() as lines:
                    super().run()
            except (Exception, SystemExit) as error:
                # Without commands, which are long.
                last = [line for line in lines if line and len(line) < 300][-8:] or [str(error)]
                reason = "\n  ".join(["the compiler failed (`pip install -v` shows all that it says):", *last])
        if reason is not None and WANTED == "1":
            sys.exit(f"error: DLVAE_BUILD_EXT=1, and the C++ library was not built: {reason}")
        for package in (folder / "dlvae_kernels" for folder in folders):
            if reason is None:
                (package / REASON).unlink(missing_ok=True)
            else:
                package.mkdir(parents=True, exist_ok=True)
                (package / LIBRARY).unlink(missing_ok=True)
                (package / REASON).write_text(reason + "\n")
        if reason is not None:
            print(f"warning: the package is pure Python, the C++ library was not built: {reason}", file=sys.stderr)
            self.extensions = self.distribution.ext_modules = []


class Wheel(bdist_wheel):
    """A wheel without the library is one for any machine."""

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

"""Builds csrc where torch and a compiler are at hand; without them the package is pure Python, and says why."""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def extension():
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    return CppExtension(
        "dlvae_kernels.native_cpu",
        sources,
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    )


from torch.utils.cpp_extension import BuildExtension

setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})

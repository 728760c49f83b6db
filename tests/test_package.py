"""Properties of the package as a whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlvae_kernels
from dlvae_kernels.backends import reference, unavailable_reason

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.small


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


def test_import_loads_no_optional_package():
    code = "import sys, torch, dlvae_kernels; print(torch.cuda.is_initialized(), *sys.modules)"
    initialised, *loaded = run(code).stdout.split()
    assert initialised == "False"
    assert "dlvae_kernels.ops" in loaded
    assert not {"torchvision", "umap", "matplotlib", "models"} & set(loaded)


def test_public_names_have_docstrings():
    for name in dlvae_kernels.__all__:
        assert getattr(dlvae_kernels, name).__doc__, name


def test_every_op_is_registered_and_has_a_reference():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlvae::")}
    assert registered == set(reference.__all__)
    for name in registered:
        op = getattr(torch.ops.dlvae, name).default
        assert torch.Tag.pt2_compliant_tag in op.tags
        # A kernel on these keys would bypass the router.
        for key in ("CPU", "CUDA"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"dlvae::{name}", key)


def test_version_equals_pyproject():
    assert f'version = "{dlvae_kernels.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^## Unreleased$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_vector_quantize_dense_matrix_of_17_gigabytes_memory_stays_bounded():
    code = """
import resource, threading, torch, dlvae_kernels
x, codebook = torch.randn(65536, 8), torch.randn(65536, 8)
dlvae_kernels.vector_quantize(x[:100], codebook[:100])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = dlvae_kernels.vector_quantize(x, codebook)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, out.counts.sum().item())
"""
    compiled = unavailable_reason("native", "vector_quantize_fwd") is None
    result = run(code)
    assert result.returncode == 0, result.stderr
    megabytes, rows = map(float, result.stdout.split())
    assert rows == 65536
    assert megabytes < (64 if compiled else 300)


def test_files_have_at_most_400_lines():
    files = [
        file
        for name in ("dlvae_kernels", "models", "examples", "benchmarks", "tools")
        for file in (ROOT / name).rglob("*.py")
    ]
    assert files
    assert {file.name: n for file in files if (n := len(file.read_text().splitlines())) > 400} == {}

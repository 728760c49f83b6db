from __future__ import annotations

import sys

import pytest

from .runs import SMALL, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Flags of a small model and small images."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 60)
    return [*SMALL, "--data", f"folder:{folder}"]


@pytest.fixture(scope="session")
def _hidden_umap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_umap")
    (folder / "umap.py").write_text("raise ImportError('hidden by a test')")
    return folder


@pytest.fixture(scope="module")
def without_umap(_hidden_umap):
    """Hide UMAP from this process and subprocesses, because it compiles for half a minute in each of them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "umap", None)
        monkeypatch.setenv("PYTHONPATH", str(_hidden_umap))
        yield

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from .runs import SMALL


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Flags of a small model and small images."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(60):
        coarse = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BILINEAR).save(folder / f"{i}.png")
    return [*SMALL, "--data", f"folder:{folder}"]


@pytest.fixture(scope="session")
def _hidden_umap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_umap")
    (folder / "umap.py").write_text("raise ImportError('hidden by a test')")
    return folder


@pytest.fixture
def without_umap(_hidden_umap, monkeypatch):
    """UMAP compiles for half a minute in each process: here only the test of it pays."""
    monkeypatch.setenv("PYTHONPATH", str(_hidden_umap))

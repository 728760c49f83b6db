"""`python -m benchmarks codec`: its rows, and the committed figure."""

from __future__ import annotations

import hashlib

import pytest
import torch

from benchmarks import codec, results
from examples import audio_codec


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_figure_is_that_of_the_committed_rows(tmp_path):
    from PIL import Image

    digest = hashlib.sha256(codec.PATH.read_bytes()).hexdigest()
    codec.draw(figure=tmp_path / "a.png")
    with Image.open(codec.FIGURE) as committed, Image.open(tmp_path / "a.png") as fresh:
        assert committed.info["Source"] == digest, "run `python -m benchmarks plot`"
        assert fresh.convert("L").getextrema()[0] < 128


def test_committed_si_sdr_of_this_library_rises_with_every_level():
    rows = [row for row in results.read(codec.PATH) if row["implementation"] == "dlvae_kernels"]
    for seed in {row["seed"] for row in rows}:
        found = [float(row["si_sdr_db"]) for row in rows if row["seed"] == seed]
        assert len(found) == 8
        assert found == sorted(set(found))


def test_write_adds_a_row_for_each_codec_and_level(tmp_path, monkeypatch, threads):
    for name, value in {"WIDTHS": (4, 4, 4), "NUM_FEATURES": 8, "NUM_CODES": 16, "NUM_LEVELS": 2, "BATCH": 2}.items():
        monkeypatch.setattr(audio_codec, name, value)
    for name in "ab":
        audio_codec.write_wav(tmp_path / f"{name}.wav", torch.randn(16000) / 4, 16000)
    codec.write(tmp_path, 5, [3], tmp_path / "rows.csv")
    rows = results.read(tmp_path / "rows.csv")
    assert [(row["implementation"], row["levels"]) for row in rows] == [
        (name, str(level)) for name in codec.quantizers() for level in (1, 2)
    ]
    assert all(0 < float(row["quantizer_ms"]) < float(row["step_ms"]) for row in rows)
    assert {row["step_ratio"] for row in rows if row["implementation"] == "dlvae_kernels"} == {"1.000"}
    assert [row["levels"] for row in codec.by_level(rows)["dlvae_kernels"]] == [1, 2]

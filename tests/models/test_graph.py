from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from models import graph
from models.config import parse
from models.graph import Repeated
from models.train import Run

CPU = torch.device("cpu")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class _Graph:
    """Stands for torch.cuda.CUDAGraph: the capture runs nothing, and a replay counts."""

    replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def calls(monkeypatch):
    """The calls of a step, without the streams of a GPU."""
    calls = []
    monkeypatch.setattr(Repeated, "_run_aside", lambda self: self._step())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    return calls


def test_updates_are_captured_after_a_few_and_then_repeated(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: nullcontext())
    repeated = Repeated(lambda: calls.append(None), CPU)
    for _ in range(10):
        repeated()
    # The capture calls the step too, but runs nothing of it.
    assert len(calls) == graph._BEFORE_CAPTURE + 1
    assert repeated._graph.replays == 10 - graph._BEFORE_CAPTURE


def test_a_capture_that_fails_says_why(calls, monkeypatch, capsys):
    def refuse(*args, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    repeated = Repeated(lambda: calls.append(None), CPU)
    for _ in range(10):
        repeated()
    assert len(calls) == 10
    assert not repeated.is_captured
    expected = "no CUDA graph, updates run launch by launch: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == expected


def test_why_there_is_no_graph():
    assert graph.why_not(CPU, 1) == "the device is cpu"
    assert "several ranks" in graph.why_not(torch.device("cuda"), 2)
    assert graph.why_not(torch.device("cuda"), 1) is None


def _run(images, folder, model, *flags):
    words = [*images, "--model", model, "--device", "cuda", "--init", "normal", "--updates", "20", *flags]
    run = Run(parse([*words, "--precision", "float32"]).config, folder)
    run.start()
    return run


@pytest.mark.parametrize("model", ["vqvae-ema", "vqvae", "dlvae"])
@pytest.mark.parametrize("loading", ["resident", "streamed"], ids=str)
class TestOnAGpu:
    pytestmark = needs_gpu

    def test_a_graph_trains_as_single_launches_do(self, model, loading, images, tmp_path):
        runs = [
            _run(images, tmp_path / flag, model, f"--{flag}", "--loading", loading)
            for flag in ("cuda-graph", "no-cuda-graph")
        ]
        assert all(run.train() for run in runs)
        assert runs[0]._launch.is_captured
        losses = [[row[1] for row in run._step.read(run.ranks).rows(0, 20)] for run in runs]
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=1e-3)

    def test_the_host_never_waits(self, model, loading, images, tmp_path):
        run = _run(images, tmp_path / "run", model, "--loading", loading)
        run.model.train()
        for _ in range(5):
            run.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                run.step()
            run._look(waits=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(run._asked) == 1

from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch

from models import graph
from models.config import parse
from models.graph import Repeated
from models.train import Run

from .runs import ROOT

CPU = torch.device("cpu")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class _Graph:
    """Stands for torch.cuda.CUDAGraph: the capture runs nothing, and a replay counts."""

    replays = 0

    def replay(self):
        _Graph.replays += 1


@pytest.fixture
def calls(monkeypatch):
    """The calls of a step, without a GPU."""
    monkeypatch.setattr(Repeated, "_run_aside", lambda self: self._step())
    monkeypatch.setattr(Repeated, "_recover", lambda self, current: None)
    monkeypatch.setattr(_Graph, "replays", 0)
    nothing = {"Stream": None, "current_stream": None, "device": nullcontext(), "get_sync_debug_mode": 0}
    for name, value in nothing.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: nullcontext())
    return []


def test_updates_are_captured_after_a_few_and_then_repeated(calls):
    repeated = Repeated(lambda: calls.append(None), CPU)
    for _ in range(10):
        repeated()
    # The capture calls the step too, but runs nothing of it.
    assert len(calls) == graph._BEFORE_CAPTURE + 1
    assert _Graph.replays == 10 - graph._BEFORE_CAPTURE
    assert repeated.is_captured


def test_a_capture_that_fails_says_why(calls, monkeypatch, capsys):
    class Refuses:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    def step():
        calls.append(None)
        if len(calls) == graph._BEFORE_CAPTURE + 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: Refuses())
    repeated = Repeated(step, CPU)
    for _ in range(10):
        repeated()
    assert len(calls) == 10 + 1
    assert not repeated.is_captured
    expected = "no CUDA graph, updates run launch by launch: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == expected


def test_a_step_that_waits_is_not_captured(calls, capsys):
    def step():
        calls.append(None)
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)", stacklevel=1)

    repeated = Repeated(step, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(10):
            repeated()
    assert len(calls) == 10
    assert not repeated.is_captured
    assert f"launch by launch: {__file__}:{step.__code__.co_firstlineno + 2} waits for" in capsys.readouterr().err


_STEPS = """
import sys, torch
from models.graph import Repeated

device, done, default = torch.device("cuda"), torch.zeros((), device="cuda"), torch.cuda.current_stream()

def step():
    torch.randperm(10, device=device)
    done.add_(1)
    {}

repeated = Repeated(step, device)
for _ in range(10):
    repeated()
assert done.item() == 10
assert not repeated.is_captured
assert torch.cuda.current_stream() == default
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("operation", "reason"), [("done.item()", "waits for the GPU"), ("torch.cuda.synchronize()", "")]
)
def test_on_a_gpu_updates_go_on_without_a_graph(operation, reason):
    # In a process of its own: a capture that fails leaves traces in older torch.
    words = [sys.executable, "-c", _STEPS.format(operation)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no CUDA graph, updates run launch by launch: " in result.stderr
    assert reason in result.stderr


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
        ends = []
        for flag in ("cuda-graph", "no-cuda-graph"):
            # Its beginning sets the seed, from which the training draws too.
            run = _run(images, tmp_path / flag, model, f"--{flag}", "--loading", loading)
            assert run.train()
            assert run._launch is run._step if flag == "no-cuda-graph" else run._launch.is_captured
            losses = torch.tensor([row[1] for row in run._step.read(run.ranks).rows(0, 20)])
            ends.append((losses, run.model.codes.detach()))
        (losses, codes), (expected, expected_codes) = ends
        torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-3)
        # Where other rows were drawn for dead codes, those are elsewhere.
        assert (codes - expected_codes).abs().mean() < 1e-2

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

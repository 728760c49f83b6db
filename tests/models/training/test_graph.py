from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch

from models.training import graph
from models.training.config import parse
from models.training.graph import GraphedStep
from models.training.run import Run

from ..runs import ROOT

CPU = torch.device("cpu")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class _Graph:
    """A substitute for torch.cuda.CUDAGraph: a capture runs nothing, and replays are counted."""

    replays = 0

    def replay(self):
        _Graph.replays += 1


@pytest.fixture
def calls(monkeypatch):
    """The list of calls of a step, with torch.cuda replaced."""
    monkeypatch.setattr(GraphedStep, "_run_on_side_stream", lambda self: self._step())
    monkeypatch.setattr(GraphedStep, "_recover", lambda self, current: None)
    monkeypatch.setattr(_Graph, "replays", 0)
    nothing = {"Stream": None, "current_stream": None, "device": nullcontext(), "get_sync_debug_mode": 0}
    for name, value in nothing.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: nullcontext())
    return []


def test_graphed_step_after_warm_up_is_captured_and_replayed(calls):
    graphed = GraphedStep(lambda: calls.append(None), CPU)
    for _ in range(10):
        graphed()
    # The capture calls the step once more, without its kernels.
    assert len(calls) == graph._WARMUP_STEPS + 1
    assert _Graph.replays == 10 - graph._WARMUP_STEPS
    assert graphed.is_captured


def test_graphed_step_with_failing_capture_runs_without_graph_and_prints_reason(calls, monkeypatch, capsys):
    class Refuses:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    def step():
        calls.append(None)
        if len(calls) == graph._WARMUP_STEPS + 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: Refuses())
    graphed = GraphedStep(step, CPU)
    for _ in range(10):
        graphed()
    assert len(calls) == 10 + 1
    assert not graphed.is_captured
    expected = "no CUDA graph, kernels are launched one by one: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == expected


def test_graphed_step_that_synchronises_is_not_captured(calls, capsys):
    def step():
        calls.append(None)
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)", stacklevel=1)

    graphed = GraphedStep(step, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(10):
            graphed()
    assert len(calls) == 10
    assert not graphed.is_captured
    assert f"one by one: {__file__}:{step.__code__.co_firstlineno + 2} waits for" in capsys.readouterr().err


_STEPS = """
import sys, torch
from models.training.graph import GraphedStep

device, done, default = torch.device("cuda"), torch.zeros((), device="cuda"), torch.cuda.current_stream()

def step():
    torch.randperm(10, device=device)
    done.add_(1)
    {}

graphed = GraphedStep(step, device)
for _ in range(10):
    graphed()
assert done.item() == 10
assert not graphed.is_captured
assert torch.cuda.current_stream() == default
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("operation", "reason"), [("done.item()", "waits for the GPU"), ("torch.cuda.synchronize()", "")]
)
def test_graphed_step_on_gpu_with_uncapturable_operation_runs_without_graph(operation, reason):
    # In its own process, because a failed capture leaves state behind in older torch.
    words = [sys.executable, "-c", _STEPS.format(operation)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no CUDA graph, kernels are launched one by one: " in result.stderr
    assert reason in result.stderr


def _run(images, folder, model, *flags):
    words = [*images, "--model", model, "--device", "cuda", "--init", "normal", "--updates", "20", *flags]
    run = Run(parse([*words, "--precision", "float32"]).config, folder)
    run.start()
    return run


@pytest.mark.parametrize("model", ["vqvae-ema", "vqvae", "dlvae"])
@pytest.mark.parametrize("loading", ["resident", "streamed"], ids=str)
class TestOnGpu:
    pytestmark = needs_gpu

    def test_run_with_graph_equals_run_without_graph(self, model, loading, images, tmp_path):
        ends = []
        for flag in ("cuda-graph", "no-cuda-graph"):
            # The constructor of the run sets the seed, from which training draws as well.
            run = _run(images, tmp_path / flag, model, f"--{flag}", "--loading", loading)
            assert run.train()
            assert run._launch is run._step if flag == "no-cuda-graph" else run._launch.is_captured
            losses = torch.tensor([row[1] for row in run._step.read(run.ranks).rows(0, 20)])
            ends.append((losses, run.model.codes.detach()))
        (losses, codes), (expected, expected_codes) = ends
        torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-3)
        # Dead codes may have been reinitialised from other vectors.
        assert (codes - expected_codes).abs().mean() < 1e-2

    def test_step_never_synchronises(self, model, loading, images, tmp_path):
        run = _run(images, tmp_path / "run", model, "--loading", loading)
        run.model.train()
        for _ in range(5):
            run.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                run.step()
            run._read_metrics(waits=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(run._pending) == 1

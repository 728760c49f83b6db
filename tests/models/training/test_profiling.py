from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from models.training.config import parse
from models.training.profiling import table
from models.training.run import Run
from models.training.step import PARTS


def _train(images, folder, updates):
    run = Run(parse([*images, "--updates", str(updates), "--profile"]).config, folder)
    run.start()
    assert run.train()


def test_profile_of_a_run_has_trace_and_table(images, tmp_path, capsys):
    _train(images, tmp_path / "run", 30)
    printed = capsys.readouterr().out
    text = (tmp_path / "run/profile.txt").read_text()
    assert text in printed
    assert str(tmp_path / "run/trace.json") in printed
    whole = float(re.match(r"An update takes (\S+) ms", text)[1])
    sections = dict(re.findall(r"^(part|operation)\n((?:  .*\n)+)", text, re.MULTILINE))
    for section in sections.values():
        rows = re.findall(r"^  (.+?) +(\S+) ms +(\S+)%$", section, re.MULTILINE)
        assert sum(float(ms) for _, ms, _ in rows) == pytest.approx(whole, rel=0.05)
        assert sum(float(share) for *_, share in rows) == pytest.approx(100, rel=0.05)
    assert re.findall(r"^  (.+?) +\S+ ms", sections["part"], re.MULTILINE) == [*PARTS, "other"]
    assert "  aten::convolution_backward" in text
    events = json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"]
    for part in PARTS:
        assert sum(event.get("name") == part and event.get("ph") == "X" for event in events) == 10


def test_profile_with_full_disk_leaves_no_file(images, tmp_path, monkeypatch):
    def write_half(self, path):
        Path(path).write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", write_half)
    run = Run(parse([*images, "--updates", "30", "--profile"]).config, tmp_path / "run")
    run.start()
    with pytest.raises(OSError, match=r"trace\.json cannot be written \(.*No space left on device\)"):
        run.train()
    assert not list(run.folder.glob("trace.json*"))


@pytest.mark.parametrize("updates", [5, 12])
def test_profile_of_a_short_run_prints_reason(updates, images, tmp_path, capsys):
    _train(images, tmp_path / "run", updates)
    assert f"no profile: it needs 20 updates, the run did {updates}" in capsys.readouterr().err
    assert not (tmp_path / "run/trace.json").exists()


def test_table_on_gpu_lists_kernels_only():
    def event(key, device, host, kernel, is_user_annotation=False):
        times = {"cpu_time_total": host, "self_cpu_time_total": host, "self_device_time_total": kernel}
        return SimpleNamespace(key=key, device_type=device, is_user_annotation=is_user_annotation, **times)

    events = [
        event("aten::conv2d", DeviceType.CPU, 900, 0),
        event("search", DeviceType.CUDA, 0, 2000),
        event("winograd", DeviceType.CUDA, 0, 6000),
        event("backward", DeviceType.CUDA, 0, 7000, is_user_annotation=True),
    ]
    text = table(events, 1e-3, torch.device("cuda"))
    rows = re.findall(r"^  (.+?) +(\S+) ms +(\S+)%$", text, re.MULTILINE)
    assert rows == [("winograd", "0.600", "60.0"), ("search", "0.200", "20.0"), ("other", "0.200", "20.0")]

"""The files of a report are replaced together or not at all."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.report import plots
from models.report.__main__ import main as report_main
from models.report.page import CAPTIONS
from models.training.config import parse
from models.training.files import replacing, write_together
from models.training.run import Run

from ..runs import ROOT

FILES = {"summary.json", "report.html", *(f"{name}.png" for name in CAPTIONS)}


@pytest.fixture(scope="module")
def reported(images, tmp_path_factory):
    """The folder of a run with a report."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    run = Run(parse([*images, "--updates", "10"]).config, folder)
    run.start()
    assert run.train()
    run.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "umap", None)
        assert report_main([str(folder)]) == 0
    return folder


@pytest.fixture
def run(reported, tmp_path, monkeypatch):
    """A copy of this folder, where the files of the report have another content."""
    monkeypatch.setitem(sys.modules, "umap", None)
    folder = Path(shutil.copytree(reported, tmp_path / "run"))
    for name in FILES:
        (folder / name).write_text("old")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.small
def test_report_replaces_all_its_files(run, reported):
    assert report_main([str(run)]) == 0
    assert all((run / name).read_bytes() != b"old" for name in FILES)
    assert contents(run).keys() == contents(reported).keys()


def test_report_with_error_in_last_plot_changes_no_file(run, monkeypatch):
    def fail(*args):
        raise RuntimeError("no figure")

    monkeypatch.setattr(plots, "explained_variance", fail)
    before = contents(run)
    with pytest.raises(RuntimeError, match="no figure"):
        report_main([str(run)])
    assert contents(run) == before


def test_report_with_full_disk_changes_no_file(run):
    # The limit is larger than all plots and smaller than the page.
    before = contents(run)
    result = subprocess.run(
        [sys.executable, "-m", "models.report", str(run)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": _without_umap(run.parent)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)),
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: a file in {run} cannot be written (")
    assert "Traceback" not in result.stderr
    assert contents(run) == before


def _without_umap(folder):
    (folder / "hidden").mkdir()
    (folder / "hidden/umap.py").write_text("raise ImportError('hidden by a test')")
    return str(folder / "hidden")


def test_report_killed_before_the_last_file_changes_no_file(run):
    before = contents(run)
    code = f"""
import os, signal, sys
from pathlib import Path
sys.modules["umap"] = None
from models.report import report
from models.report.__main__ import main
# The page is generated last.
def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)
report.html_page = kill
main([{str(run)!r}])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert result.returncode == -9
    assert contents(run) == before


def test_report_into_read_only_folder_ends_with_one_line(run, monkeypatch, capsys):
    # For root, no folder is read-only.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run)
    assert report_main([str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {run} is not writable; copy the run to another folder and report on it there"


def test_replacing_after_error_keeps_file_and_removes_temporary_file(tmp_path):
    def write():
        with replacing(tmp_path / "a") as (partial,):
            partial.write_text("new")
            raise RuntimeError("stop")

    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert contents(tmp_path) == {"a": b"old"}


def test_write_together_with_failing_sync_replaces_no_file(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    synced = []

    def sync(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=r"a file in .* cannot be written \(.*No space left on device\)"):
        write_together({tmp_path / "a": "new", tmp_path / "b": b"new"})
    assert contents(tmp_path) == {"a": b"old"}


def test_write_together_creates_files_with_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        write_together({tmp_path / "a": "text"})
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640

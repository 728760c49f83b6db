"""Only one process at a time trains in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest

from models import train
from models.training.config import parse
from models.training.data import SetupError
from models.training.lock import RunLock
from models.training.run import Run

from ..runs import ROOT, command


@pytest.fixture
def started(images, tmp_path):
    """A process that trains and has saved, with its workers, and the folder of its run."""
    run = tmp_path / "run"
    words = command("--updates", 100_000, "--out", run, *images, "--loading", "streamed")
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(words, cwd=ROOT, stderr=errors, start_new_session=True)
    while not (run / "checkpoint.safetensors").exists():
        assert process.poll() is None, (tmp_path / "errors").read_text()
        time.sleep(0.01)
    yield process, run
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_resume_of_a_running_run_names_its_process_until_it_is_killed(started, capsys):
    process, run = started
    before = (run / "metrics.csv").read_text()
    assert train.main(["--resume", str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    holder = f"process {process.pid} on {socket.gethostname()}"
    assert line.startswith(f"error: {run} is in use by {holder}; wait until it ends or stop it")
    assert (run / "metrics.csv").read_text().startswith(before)
    # The workers end later, and must not hold the lock.
    process.kill()
    process.wait()
    resumed = Run(parse(["--resume", str(run)]).config, run)
    resumed.resume()
    assert resumed.update > 0
    resumed.close()


def test_start_in_the_folder_of_another_run_raises(images, tmp_path):
    first, second = (Run(parse(images).config, tmp_path / "run") for _ in range(2))
    first.start()
    before = (tmp_path / "run/config.json").stat()
    with pytest.raises(SetupError, match="run exists already; choose another --out, or resume it with --resume"):
        second.start()
    assert (tmp_path / "run/config.json").stat() == before
    with pytest.raises(ValueError, match="run is in use by process"):
        second.resume()
    first.close()
    second.resume()


def test_lock_is_not_inherited_by_a_forked_process(tmp_path):
    lock = RunLock(tmp_path)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(reader, 1)
        lock.release()
        RunLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_lock_on_file_system_without_locks_warns(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunLock(tmp_path).release()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: the file system of {tmp_path} has no locks (No locks available); make sure that no"
    )


def test_resume_with_unusable_lock_file_ends_with_one_line(images, tmp_path, capsys):
    run = Run(parse(images).config, tmp_path / "run")
    run.start()
    run.close()
    (run.folder / "run.lock").unlink()
    (run.folder / "run.lock").mkdir()
    assert train.main(["--resume", str(run.folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: .*Is a directory: '.*run\.lock'", line)


def test_resume_removes_temporary_files_of_a_killed_process(images, tmp_path):
    run = Run(parse(images).config, tmp_path / "run")
    run.start()
    run.close()
    left = run.folder / "checkpoint.safetensors.0123abcd.partial"
    left.write_bytes(b"half")
    (run.folder / ".tmpAb12cD").write_bytes(b"half, by safetensors")
    other = run.folder / "report.html.0123abcd.partial"
    shutil.copy(left, other)
    run.resume()
    run.close()
    assert not left.exists()
    assert not (run.folder / ".tmpAb12cD").exists()
    # Another process may be writing a report.
    assert other.exists()


@pytest.mark.slow
def test_resume_of_locked_run_ends_all_ranks(images, tmp_path):
    run = Run(parse(images).config, tmp_path / "run")
    run.start()
    words = command("--resume", run.folder, ranks=2)
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    run.close()
    assert result.returncode != 0
    assert f"error: {run.folder} is in use by process {os.getpid()} on" in result.stderr
    # torchrun prints its own traceback.
    assert "models/train.py" not in result.stderr

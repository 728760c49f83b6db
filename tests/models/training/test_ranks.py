"""Several ranks over gloo, started by torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from models.training.config import Config, parse
from models.training.device import pick_device
from models.training.ranks import Ranks, join
from models.training.run import Run

from ..runs import ROOT, command, free_port, rows, spawn, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_umap")]

UPDATES = 10
# Without vectors drawn from the batch, which depend on the number of ranks.
CASES = {
    "vqvae-ema": ["--model", "vqvae-ema", "--init", "normal", "--dead-code-threshold", "0"],
    "vqvae": ["--model", "vqvae", "--init", "uniform", "--dead-code-threshold", "0"],
    "dlvae": ["--model", "dlvae", "--sparsity", "0.1"],
}


def _config(images, case):
    return parse(
        [*images, *CASES[case], "--precision", "float32", "--schedule", "constant", "--updates", str(UPDATES)]
    ).config


def _train(images, case, folder, ranks=None):
    run = Run(_config(images, case), folder, ranks)
    run.start()
    assert run.train()
    return run


def _work(ranks: Ranks, images: list[str], folder: Path) -> None:
    weights = {case: _train(images, case, folder / case, ranks).model.state_dict() for case in CASES}
    torch.save(weights, folder / f"{ranks.rank}.pt")


@pytest.fixture(scope="module")
def together(images, tmp_path_factory):
    """The folder with a run of two ranks for each case, and the final weights of each rank."""
    folder = tmp_path_factory.mktemp("together")
    spawn(_work, images, folder)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_run_on_two_ranks_equals_run_of_one_process(case, images, together, tmp_path):
    folder, ends = together
    alone = _train(images, case, tmp_path / "run")
    first, second = (end[case] for end in ends)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    codes = next(name for name in first if name.endswith(("_embedding.weight", "dictionary")))
    moved = Run(_config(images, case), tmp_path / "unwritten").model.state_dict()[codes] - first[codes]
    assert moved.abs().max() > 5e-3
    torch.testing.assert_close(first[codes], alone.model.state_dict()[codes], rtol=1e-5, atol=1e-5)

    expected = rows(alone.folder)
    assert len(expected) == UPDATES
    for row, other in zip(rows(folder / case), expected, strict=True):
        # The counts of codes that learn by gradient and are not revived stay those of each rank.
        for name in row if case != "vqvae" else ("update", "nmse", "loss", "perplexity", "lr"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-3, nan_ok=True), name


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_with_another_number_of_ranks_equals_one_run(before, after, images, tmp_path):
    run = tmp_path / "run"
    flags = [*images, *CASES["vqvae-ema"], "--precision", "float32"]
    assert train("--updates", 20, "--schedule", "constant", "--out", run, *flags, ranks=before).returncode == 0
    result = train("--resume", run, "--updates", 30, ranks=after)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("held-out NMSE") == 1
    assert [int(row["update"]) for row in rows(run)] == list(range(1, 31))

    whole = tmp_path / "whole"
    assert train("--updates", 30, "--schedule", "constant", "--out", whole, *flags).returncode == 0
    codes, expected = (load_file(each / "model.safetensors")["_vq_vae._embedding.weight"] for each in (run, whole))
    torch.testing.assert_close(codes, expected, rtol=1e-3, atol=1e-4)
    losses, expected = (np.array([float(row["loss"]) for row in rows(each)]) for each in (run, whole))
    np.testing.assert_allclose(losses, expected, rtol=1e-2)


def _started(images, run, *flags):
    """Two ranks under torchrun that have saved, and the process of rank 1."""
    process = subprocess.Popen(
        command("--updates", 100_000, "--out", run, *images, *flags, ranks=2),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_until_saved(run, [process])
    return process, _worker(process, 1)


def _wait_until_saved(run, processes):
    while not (run / "checkpoint.safetensors").exists():
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def _worker(process, rank):
    """The id of the process of a rank, or None if this torchrun has not started it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {Path(f"/proc/{each}/environ").read_bytes().partition(b"\0RANK=")[2][:1]: int(each) for each in children}
    return ranks.get(str(rank).encode())


def test_killed_rank_ends_the_job_and_the_run_resumes(images, tmp_path):
    run = tmp_path / "run"
    process, second = _started(images, run)
    os.kill(second, signal.SIGKILL)
    begin = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert process.returncode != 0
    assert f"if a rank is lost, resume with: torchrun ... -m models.train --resume {run}" in output
    message = (
        r"error: rank 0 can no longer reach another rank \(.*\); resume with: torchrun .* -m models.train --resume "
    )
    assert re.search(message + str(run), errors), errors
    assert "exitcode  : -9" in errors
    done = len(rows(run))
    result = train("--resume", run, "--updates", done + 20)
    assert result.returncode == 0, result.stderr
    assert len(rows(run)) == done + 20


def test_lost_machine_ends_the_job(images, tmp_path):
    run = tmp_path / "run"
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "x"]
    words += ["--rdzv-endpoint", f"localhost:{free_port()}"]
    words += ["-m", "models.train", "--updates", "100000", "--out", str(run)]
    # Each process has the role of the agent of one machine.
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, *images],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    _wait_until_saved(run, agents)
    rank_of = {agent: _worker(agent, 0) for agent in agents}
    (kept,) = (agent for agent in agents if rank_of[agent])
    (lost,) = (agent for agent in agents if agent is not kept)
    worker = _worker(lost, 1)
    lost.kill()
    os.kill(worker, signal.SIGKILL)
    begin = time.monotonic()
    _, errors = kept.communicate(timeout=60)
    lost.communicate()
    assert time.monotonic() - begin < 60
    assert kept.returncode != 0
    assert "error: rank 0 can no longer reach another rank" in errors


def test_rank_without_answer_ends_the_job_after_the_timeout(images, tmp_path):
    process, second = _started(images, tmp_path / "run", "--rank-timeout", 3)
    os.kill(second, signal.SIGSTOP)
    begin = time.monotonic()
    message = next(line for line in process.stderr if line.startswith("error: "))
    assert time.monotonic() - begin < 20
    assert "rank 0 can no longer reach another rank" in message
    # torchrun would kill it half a minute later.
    os.kill(second, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


def _load_slowly(ranks: Ranks, folder: Path) -> None:
    with ranks.in_turns():
        loaded = len(list(folder.iterdir()))
        time.sleep(0 if ranks.rank else 3)
        (folder / str(ranks.rank)).touch()
    ranks.sum(torch.ones(1))
    # The order is rank 0, the first rank of the other machine, the other ranks.
    assert {0: loaded == 0, 2: loaded == 1}.get(ranks.rank, loaded >= 2)


def test_in_turns_orders_ranks_and_waits_longer_than_the_timeout(tmp_path):
    spawn(_load_slowly, tmp_path, ranks=4, timeout=1)
    assert len(list(tmp_path.iterdir())) == 4


def test_interrupt_stops_all_ranks_at_one_update(images, tmp_path):
    run = tmp_path / "run"
    process, _ = _started(images, run)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    done = int(re.search(r"interrupted after (\d+) updates; resume with: torchrun ... -m models.train", output)[1])
    assert len(rows(run)) == done
    assert not re.search("^error: ", errors, re.MULTILINE), errors
    result = train("--resume", run, "--updates", done + 10, ranks=2)
    assert result.returncode == 0, result.stderr


def test_ranks_with_invalid_flags_end_with_message(images, tmp_path):
    result = train(*images, "--batch-size", 7, "--out", tmp_path / "run", ranks=2)
    assert result.returncode != 0
    assert "error: expected batch_size to be a multiple of 2, the number of ranks, got 7" in result.stderr
    result = train(*images, "--out", tmp_path, ranks=2)
    assert result.stderr.count(f"error: {tmp_path} exists already") == 1


def test_resume_on_rank_with_another_folder_raises(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "from_first", lambda self, value: 20)
    run = Run(parse([*images]).config, tmp_path)
    with pytest.raises(
        ValueError, match="same folder on all ranks, got a checkpoint of 0 updates on rank 0 and of 20 on rank 0"
    ):
        run.resume()


def test_commands_of_the_page_on_distributed_training_are_valid(monkeypatch, tmp_path):
    (tmp_path / "runs/eight").mkdir(parents=True)
    (tmp_path / "runs/eight/config.json").write_text(parse([]).config.to_json())
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/distributed.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:srun )?torchrun (.*) -m models.train (.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    for before, after in commands:
        get_args_parser().parse_args([*before.replace("$SLURM_NNODES", "4").split(), "x"])
        parse(after.split())
    named = set(re.findall(r"`(--[a-z-]+)", page))
    known = set(get_args_parser()._option_string_actions) | {f"--{name.replace('_', '-')}" for name in vars(Config())}
    assert named <= known | {"--resume"}


def test_pick_device_of_rank_selects_its_gpu(monkeypatch):
    chosen = []
    assert pick_device("cpu", 1) == torch.device("cpu")
    monkeypatch.setattr(torch, "empty", lambda *args, **options: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [pick_device(name, 1) for name in ("auto", "cuda")] == [torch.device("cuda", 1)] * 2 == chosen
    with pytest.raises(
        ValueError, match="expected device to be cuda for several ranks, each with its own GPU, got 'cuda:0'"
    ):
        pick_device("cuda:0", 1)
    with pytest.raises(ValueError, match="expected a GPU for each rank of this machine, got 2 for at least 3 ranks"):
        pick_device("cuda", 2)


def test_join_with_gpus_uses_nccl(monkeypatch):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda **options: calls.append(options))
    monkeypatch.setattr(dist, "new_group", lambda **options: calls.append(options["backend"]))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    own = torch.device("cuda", 1)
    ranks = join(own, 50)
    assert calls == [{"timeout": timedelta(seconds=50), "backend": "nccl", "device_id": own}, "gloo"]
    assert (ranks.rank, ranks.count, ranks.local, ranks.writes) == (1, 2, 1, False)

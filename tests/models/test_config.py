from __future__ import annotations

import dataclasses
import json

import pytest

from models.config import Config, parse


def test_every_field_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text


def test_flags_set_fields(tmp_path):
    config = parse(["--model", "dlvae", "--lr", "0.5", "--no-channels-last", "--updates", "7"]).config
    assert (config.model, config.lr, config.channels_last, config.updates) == ("dlvae", 0.5, False, 7)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert Config.read(path) == config


@pytest.mark.parametrize("text", ["", "{", "[]", '{"no_such_field": 1}', '{"updates": 0}'])
def test_a_broken_configuration_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json holds no configuration"):
        Config.read(tmp_path / "config.json")


def test_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = parse(["--data", "folder:images"]).config
    assert config.data == f"folder:{tmp_path / 'images'}"
    assert config.data_dir == str(tmp_path / "data")
    assert parse([]).config.data == "patches"


@pytest.mark.parametrize(("model", "init"), [("vqvae", "uniform"), ("vqvae-ema", "normal")])
def test_the_notebooks_hyper_parameters(model, init):
    config = parse(["--preset", "notebook", "--model", model]).config
    expected = {
        "batch_size": 256,
        "hiddens": 128,
        "residual_layers": 2,
        "residual_hiddens": 32,
        "num_embeddings": 512,
        "embedding_dim": 256,
        "sparsity": 0.0,
        "sparsity_level": 100,
        "commitment_cost": 0.25,
        "decay": 0.99,
        "lr": 1e-4,
        "updates": 200_000,
        "schedule": "constant",
        "init": init,
        "dead_code_threshold": 0.0,
        "gradient": "straight_through",
        "checkpoint_every": 2000,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert parse(["--preset", "notebook", "--updates", "5"]).config.updates == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--updates", "0"], "expected updates to be a whole number of at least 1, got 0"),
        (["--hiddens", "1"], "expected hiddens to be a whole number of at least 2, got 1"),
        (["--seed", "-1"], r"expected seed to be a whole number in \[0, 4294967295\], got -1"),
        (["--lr", "inf"], r"expected lr to lie in .*, got inf"),
        (["--batch-size", "-1"], "expected batch_size to be a whole number of at least 1, got -1"),
        (["--lr", "-1"], r"expected lr to lie in .*, got -1.0"),
        (["--decay", "0"], r"decay is 0.0; vqvae-ema needs it in \(0, 1\]"),
        (["--model", "gan"], "invalid choice: 'gan'"),
        (["--resume", "no/such/run"], "--resume no/such/run: there is no"),
    ],
)
def test_mistakes_end_with_a_message(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    import re

    assert re.search(message, capsys.readouterr().err)


def test_resume_keeps_the_configuration(tmp_path, capsys):
    (tmp_path / "config.json").write_text(Config(seed=9, updates=5).to_json())
    command = parse(["--resume", str(tmp_path), "--updates", "8", "--seed", "9"])
    assert command.resume == tmp_path
    assert (command.config.seed, command.config.updates) == (9, 8)
    assert command.config.out == str(tmp_path)
    for flags in (["--seed", "1"], ["--preset", "notebook"]):
        with pytest.raises(SystemExit):
            parse(["--resume", str(tmp_path), *flags])
        assert (
            "only updates, device, checkpoint_every, data_dir, loading, cuda_graph, compile, profile, rank_timeout may"
            f" change, not {flags[0][2:]}" in capsys.readouterr().err
        )


def test_json_is_plain():
    assert json.loads(Config().to_json())["model"] == "vqvae-ema"

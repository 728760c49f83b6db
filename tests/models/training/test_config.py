from __future__ import annotations

import dataclasses
import json
import re

import pytest

from models.build import build_model
from models.training.config import Config, parse


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text


def test_parse_with_flags_sets_fields(tmp_path):
    config = parse(["--model", "dlvae", "--lr", "0.5", "--no-channels-last", "--updates", "7"]).config
    assert (config.model, config.lr, config.channels_last, config.updates) == ("dlvae", 0.5, False, 7)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert Config.read(path) == config


@pytest.mark.parametrize("text", ["", "{", "[]", '{"no_such_field": 1}', '{"updates": 0}'])
def test_read_of_broken_configuration_names_file(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not the configuration of a run"):
        Config.read(tmp_path / "config.json")


def test_parse_with_relative_paths_makes_them_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = parse(["--data", "folder:images"]).config
    assert config.data == f"folder:{tmp_path / 'images'}"
    assert config.data_dir == str(tmp_path / "data")
    assert parse([]).config.data == "patches"


@pytest.mark.parametrize(("model", "init"), [("vqvae", "uniform"), ("vqvae-ema", "normal")])
def test_preset_notebook_has_hyper_parameters_of_notebook(model, init):
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
        (["--updates", "0"], r"expected updates to be an integer in \[1, 2147483647\], got 0"),
        (["--hiddens", "1"], r"expected hiddens to be an integer in \[2, 2147483647\], got 1"),
        (["--seed", "-1"], r"expected seed to be an integer in \[0, 4294967295\], got -1"),
        (["--lr", "inf"], r"expected lr to lie in .*, got inf"),
        (["--lr", "1e300"], r"expected lr to lie in \[0, 3\.4.*e\+38\], got 1e\+300"),
        (["--batch-size", "-1"], r"expected batch_size to be an integer in \[1, 2147483647\], got -1"),
        (["--lr", "-1"], r"expected lr to lie in .*, got -1.0"),
        (["--decay", "0"], r"expected decay to lie in \(0, 1\] for vqvae-ema, got 0.0"),
        *(
            (["--dead-code-threshold", value], f"expected dead_code_threshold to be 'auto' or .* least 0, got {shown};")
            for value, shown in (("automatic", "'automatic'"), ("-1", "-1.0"), ("nan", "nan"), ("inf", "inf"))
        ),
        (["--model", "gan"], "invalid choice: 'gan'"),
        (
            ["--resume", "no/such/run"],
            "expected --resume to be the folder of a run, got no/such/run, which has no config.json",
        ),
    ],
)
def test_parse_with_invalid_value_ends_with_message(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert re.search(message, capsys.readouterr().err)


def test_parse_with_resume_keeps_configuration_and_rejects_changes(tmp_path, capsys):
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


@pytest.mark.parametrize(("words", "value"), [([], "auto"), (["auto"], "auto"), (["0.5"], 0.5), (["0"], 0)])
def test_dead_code_threshold_is_auto_or_a_number(words, value, tmp_path):
    config = parse([word for value in words for word in ("--dead-code-threshold", value)]).config
    assert config.dead_code_threshold == value
    (tmp_path / "config.json").write_text(config.to_json())
    assert Config.read(tmp_path / "config.json") == config
    assert build_model(config, 3)._vq_vae.arguments()["dead_code_threshold"] == value


def test_to_json_is_plain_json():
    assert json.loads(Config().to_json())["model"] == "vqvae-ema"

"""The configuration of a run: one dataclass, each field a flag, saved as JSON with the run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

from dlvae_kernels.functional.checks import check_between, check_choice, check_size
from dlvae_kernels.layers.codebook_layer import Init
from dlvae_kernels.layers.dictionary_learning import Gradient


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    model: Literal["vqvae", "vqvae-ema", "dlvae"] = _flag("vqvae-ema", "codebook by gradient or by moving averages")
    data: str = _flag("patches", "patches, cifar10, svhn, fashion-mnist or folder:PATH")
    data_dir: str = _flag("data", "folder for downloads")
    updates: int = _flag(1200, "optimizer steps")
    batch_size: int = _flag(32, "images a step")
    lr: float = _flag(2e-3, "learning rate of Adam, at its highest")
    schedule: Literal["cosine", "constant"] = _flag("cosine", "of the learning rate: to zero after a warm-up, or none")
    warmup: int = _flag(50, "steps of linear warm-up of the cosine schedule")
    hiddens: int = _flag(128, "channels of encoder and decoder")
    residual_layers: int = _flag(2, "residual layers")
    residual_hiddens: int = _flag(32, "channels inside a residual layer")
    num_embeddings: int = _flag(512, "K: codes or atoms")
    embedding_dim: int = _flag(64, "D: channels of the latents")
    commitment_cost: float = _flag(0.25, "beta of the vector quantizers")
    decay: float = _flag(0.95, "of the moving averages of vqvae-ema, in (0, 1]")
    init: Init = _flag("normal", "of the codebook")
    dead_code_threshold: float = _flag(1.0, "re-draw codes that on average fewer rows of a batch take; 0: never")
    sparsity: float = _flag(0.0, "weight of the L1 norm of the coefficients of dlvae")
    sparsity_level: int = _flag(100, "atoms that dlvae keeps for a position")
    gradient: Gradient = _flag("direct", "of the decoder, through the bottleneck of dlvae")
    precision: Literal["auto", "float32", "bfloat16"] = _flag(
        "auto", "auto: bfloat16 autocast where the machine has it"
    )
    channels_last: bool = _flag(True, "lay out images and weights channels last")
    seed: int = _flag(0, "of weights, batches and random choices")
    device: str = _flag("auto", "cpu, cuda, cuda:N or auto")
    checkpoint_every: int = _flag(1000, "steps between checkpoints")
    loading: Literal["auto", "resident", "streamed"] = _flag(
        "auto", "images whole on the device, or streamed to it; auto: resident in up to half of a GPU's free memory"
    )
    cuda_graph: bool = _flag(True, "on one GPU, repeat the whole update as one CUDA graph")
    compile: bool = _flag(False, "pass the model through torch.compile")
    profile: bool = _flag(False, "profile ten updates: trace.json in the run's folder, and a table of where they go")
    rank_timeout: int = _flag(50, "seconds without a word from another rank of torchrun after which a rank gives up")
    out: str = _flag("", "folder of the run; empty: runs/MODEL-DATA-TIME")

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            types, described = _TYPES[type(entry.default)]
            if type(value := getattr(self, entry.name)) not in types:
                raise ValueError(f"{entry.name} is {value!r}; it needs to be {described}")
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name, least in _LEAST.items():
            check_size(name, value := getattr(self, name), least)
            if value > (most := _MOST.get(name, _MOST_OF_OTHERS)):
                raise ValueError(f"{name} is {value}; it needs to be a whole number of at most {most}")
        check_size("seed", self.seed, 0, 2**32 - 1)
        for name in ("lr", "commitment_cost", "dead_code_threshold", "sparsity"):
            check_between(name, getattr(self, name), 0, sys.float_info.max)
        check_between("decay", self.decay, 0, 1)
        if self.model == "vqvae-ema" and not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; vqvae-ema needs it in (0, 1]")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Config:
        """The configuration saved in a file.

        Raises:
            ValueError: the file does not hold one.
        """
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            names = [entry.name for entry in dataclasses.fields(cls)]
            if not isinstance(saved, dict):
                raise ValueError("it is not a JSON object")
            if unknown := [name for name in saved if name not in names]:
                raise ValueError(f"{unknown[0]!a} is unknown")
            if missing := [name for name in names if name not in saved]:
                raise ValueError(f"{missing[0]} is missing")
            return cls(**saved)
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{path} holds no configuration of a run ({error}); restore it from a copy") from error


# The types that a field with a default of this type may have, and their description.
_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    str: ((str,), "a text"),
}

_LEAST = {
    "updates": 1,
    "batch_size": 1,
    "warmup": 0,
    "hiddens": 2,
    "residual_layers": 0,
    "residual_hiddens": 1,
    "num_embeddings": 1,
    "embedding_dim": 1,
    "sparsity_level": 1,
    "checkpoint_every": 1,
    "rank_timeout": 1,
}
# Products of two sizes fit into 64 bits.
_MOST_OF_OTHERS = 2**31 - 1
_MOST = {"residual_layers": 1000}
_CHOICES = {name: get_args(kind) for name, kind in get_type_hints(Config).items() if get_args(kind)}

# The hyper-parameters of the notebook; what it leaves open keeps the default.
_NOTEBOOK: dict[str, Any] = {
    "updates": 200_000,
    "batch_size": 256,
    "lr": 1e-4,
    "schedule": "constant",
    "embedding_dim": 256,
    "decay": 0.99,
    "dead_code_threshold": 0.0,
    "gradient": "straight_through",
    "precision": "float32",
    "channels_last": False,
    "checkpoint_every": 2000,
}
_NOTEBOOK_INIT = {"vqvae": "uniform", "vqvae-ema": "normal", "dlvae": "uniform"}
# What may change when a run goes on; all else is as it was.
_RESUMABLE = (
    *("updates", "device", "checkpoint_every", "data_dir"),
    *("loading", "cuda_graph", "compile", "profile", "rank_timeout"),
)


@dataclass(frozen=True)
class Command:
    """What the command line asks for: a new run, or (`resume`) that the run in this folder goes on."""

    config: Config
    resume: Path | None


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists all flags\n")


def parse(arguments: list[str] | None = None) -> Command:
    """Read the command line; a mistake ends the program with a message and the exit status 2."""
    parser = Parser(prog="python -m models.train", description="Train a model and report on it.")
    parser.add_argument("--preset", choices=("default", "notebook"), default="default", help="other defaults")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    for entry in dataclasses.fields(Config):
        kind = type(entry.default)
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if entry.name in _CHOICES:
            options["choices"] = _CHOICES[entry.name]
        text = f"{entry.metadata['help']} (default: {entry.default})".replace("%", "%%")
        parser.add_argument(f"--{entry.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **options)
    given = vars(parser.parse_args(arguments))
    preset, resume = given.pop("preset"), given.pop("resume")
    try:
        if resume is not None:
            return Command(_resumed(resume, preset, given), resume)
        if preset == "notebook":
            model = given.get("model", Config.model)
            given = {**_NOTEBOOK, "init": _NOTEBOOK_INIT[model], **given}
        return Command(_with_absolute_paths(Config(**given)), None)
    except (ValueError, OSError, RuntimeError) as error:  # a loop of symbolic links is a RuntimeError
        parser.error(str(error))


def _resumed(run: Path, preset: str, given: dict[str, Any]) -> Config:
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {run}: there is no {path}; name the folder of a run")
    saved = Config.read(path)
    asked = _with_absolute_paths(dataclasses.replace(saved, **given))
    fixed = [name for name in given if name not in _RESUMABLE and getattr(asked, name) != getattr(saved, name)]
    if fixed or preset != "default":
        raise ValueError(
            f"--resume keeps the configuration of {run}: only {', '.join(_RESUMABLE)} may change,"
            f" not {', '.join(fixed) or 'preset'}"
        )
    return dataclasses.replace(asked, out=str(run))


def _with_absolute_paths(config: Config) -> Config:
    """So that a run goes on, and is reported on, from any folder."""
    kind, separator, path = config.data.partition(":")
    data = f"{kind}:{Path(path).resolve()}" if separator and path else config.data
    return dataclasses.replace(config, data=data, data_dir=str(Path(config.data_dir).resolve()))

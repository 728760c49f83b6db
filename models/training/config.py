"""The configuration of a run: a dataclass whose fields are the flags, saved as JSON in the folder of the run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch

from dlvae_kernels.functional.checks import check_between, check_choice, check_size
from dlvae_kernels.layers.codebook_state import Threshold

from ..build import NetworkConfig


@dataclass(frozen=True)
class Config(NetworkConfig):
    """All flags of a run; each annotation is the help of a flag."""

    data: Annotated[str, "image set: patches, cifar10, svhn, fashion-mnist or folder:PATH"] = "patches"
    data_dir: Annotated[str, "folder for downloads"] = "data"
    updates: Annotated[int, "number of optimizer steps"] = 1200
    batch_size: Annotated[int, "images per update, summed over all ranks"] = 32
    lr: Annotated[float, "peak learning rate of Adam"] = 2e-3
    schedule: Annotated[
        Literal["cosine", "constant"], "schedule of the learning rate: warm-up and cosine decay to zero, or constant"
    ] = "cosine"
    warmup: Annotated[int, "updates of linear warm-up of the cosine schedule"] = 50
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], "auto: bfloat16 autocast if the hardware computes in bfloat16"
    ] = "auto"
    channels_last: Annotated[bool, "store images and weights in the channels-last layout"] = True
    seed: Annotated[int, "seed of the weights, the batches and all random choices"] = 0
    device: Annotated[str, "cpu, cuda, cuda:N or auto"] = "auto"
    checkpoint_every: Annotated[int, "updates between checkpoints"] = 1000
    loading: Annotated[
        Literal["auto", "resident", "streamed"],
        "images: all on the device, or streamed by worker processes; auto: resident if they fill at most half of the"
        " free memory of the GPU",
    ] = "auto"
    cuda_graph: Annotated[bool, "on one GPU, replay the whole update as one CUDA graph"] = True
    compile: Annotated[bool, "compile the model with torch.compile"] = False
    profile: Annotated[bool, "profile ten updates into trace.json and profile.txt in the folder of the run"] = False
    rank_timeout: Annotated[int, "seconds to wait for another rank before giving up"] = 50
    out: Annotated[str, "folder of the run; empty: runs/MODEL-DATA-TIME"] = ""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            types, described = _TYPES.get(_KINDS[entry.name], _TYPES[str])
            if type(value := getattr(self, entry.name)) not in types:
                raise ValueError(f"expected {entry.name} to be {described}, got {value!r}")
            if type(value) is type(entry.default) is int:
                check_size(entry.name, value, *_BOUNDS.get(entry.name, (1, _LARGEST)))
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_between("lr", self.lr, 0, torch.finfo(torch.float32).max)
        for name in ("commitment_cost", "sparsity"):
            check_between(name, getattr(self, name), 0, sys.float_info.max)
        threshold = self.dead_code_threshold
        if threshold != "auto" and not (isinstance(threshold, (float, int)) and 0 <= threshold < math.inf):
            raise ValueError(f"expected dead_code_threshold to be 'auto' or a number of at least 0, got {threshold!r}")
        check_between("decay", self.decay, 0, 1)
        if self.model == "vqvae-ema" and self.decay == 0:
            raise ValueError("expected decay to lie in (0, 1] for vqvae-ema, got 0.0; vqvae has no moving averages")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Config:
        """The configuration saved in a file.

        Raises:
            ValueError: the file does not hold a configuration.
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
            raise ValueError(f"{path} is not the configuration of a run ({error}); restore it from a copy") from error


_KINDS = get_type_hints(Config)
# For the type of a field, the accepted types and their description; a field with choices is a string.
_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((float, int), "a number"),
    str: ((str,), "a string"),
    Threshold: ((str, float, int), "'auto' or a number of at least 0"),
}
# The product of two sizes fits into 64 bits.
_LARGEST = 2**31 - 1
# The integers with other bounds than [1, _LARGEST].
_BOUNDS = {"warmup": (0, _LARGEST), "hiddens": (2, _LARGEST), "residual_layers": (0, 1000), "seed": (0, 2**32 - 1)}
_CHOICES = {name: get_args(kind) for name, kind in _KINDS.items() if get_origin(kind) is Literal}
_HELP = {name: kind.__metadata__[0] for name, kind in get_type_hints(Config, include_extras=True).items()}

# The hyper-parameters of the notebook; the others keep their defaults.
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
# The fields that --resume may change.
_RESUMABLE = (
    *("updates", "device", "checkpoint_every", "data_dir"),
    *("loading", "cuda_graph", "compile", "profile", "rank_timeout"),
)


@dataclass(frozen=True)
class Command:
    """The parsed command line: the configuration of a new run, or of the run in the folder `resume`."""

    config: Config
    resume: Path | None


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists all flags\n")


def parse(arguments: list[str] | None = None) -> Command:
    """Parse the command line; an error ends the program with one line and the exit status 2."""
    parser = Parser(prog="python -m models.train", description="Train a model and write a report.")
    parser.add_argument(
        "--preset",
        choices=("default", "notebook"),
        default="default",
        help="set of defaults: those below, or the hyper-parameters of the VQ-VAE notebook (docs/training.md)",
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="resume the run in this folder")
    for entry in dataclasses.fields(Config):
        kind = type(entry.default)
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if _KINDS[entry.name] == Threshold:
            options["type"] = _number_or_text
        if entry.name in _CHOICES:
            options["choices"] = _CHOICES[entry.name]
        text = f"{_HELP[entry.name]} (default: {entry.default})".replace("%", "%%")
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
    except (ValueError, OSError, RuntimeError) as error:  # Path.resolve raises RuntimeError for a loop of links
        parser.error(str(error))


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _resumed(run: Path, preset: str, given: dict[str, Any]) -> Config:
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"expected --resume to be the folder of a run, got {run}, which has no config.json")
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
    """The configuration with absolute paths, so that a run is resumed and reported on from any folder."""
    kind, separator, path = config.data.partition(":")
    data = f"{kind}:{Path(path).resolve()}" if separator and path else config.data
    return dataclasses.replace(config, data=data, data_dir=str(Path(config.data_dir).resolve()))

"""Kinds of broken files in the folder of a run; `python -m tests.models.broken_runs RUN` loads all broken checkpoints.

Each kind is a function that breaks the folder of a run with a checkpoint. A rewritten checkpoint gets a valid checksum,
so that the check of its names, shapes, dtypes or values rejects it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.training import checkpoint
from models.training.config import Config
from models.training.run import Run

CHECKPOINT = "checkpoint.safetensors"
WEIGHT = "model._encoder._conv_1.weight"
USE = "buffer._vq_vae._use"


def read(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


def rewritten(folder, change, **replaced):
    """Change the dictionary of tensors and replace metadata; the checksum is that of the new content."""
    path = folder / CHECKPOINT
    tensors, metadata = read(path)
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if "progress" in replaced:
        metadata["progress"] = replaced["progress"]
    metadata["checksum"] = checkpoint.checksum(tensors, metadata["progress"])
    metadata |= replaced
    save_file(tensors, path, {name: text for name, text in metadata.items() if text is not None})


def progress(text):
    return partial(rewritten, change=id, progress=text)


def without(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return lambda folder: rewritten(folder, change)


def changed(name, value):
    """Replace an entry by `value`, or by the result of the function `value`."""

    def change(tensors):
        tensors[name] = value(tensors[name].clone()) if callable(value) else value

    return lambda folder: rewritten(folder, change)


def with_first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


def all_moments_of_one_element(tensors):
    for name in tensors:
        if name.startswith("optimizer.") and "exp_avg" in name:
            tensors[name] = torch.zeros(1)


def without_optimizer(tensors):
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        del tensors[name]


def bytes_of(change):
    """Replace the bytes of the checkpoint by the result of `change`."""

    def write(folder):
        path = folder / CHECKPOINT
        path.write_bytes(change(path.read_bytes()))

    return write


def header(change):
    """Replace the header of the checkpoint by a string, or by the result of a function of the parsed header."""

    def write(data):
        size = struct.unpack("<Q", data[:8])[0]
        text = change(json.loads(data[8 : 8 + size])) if callable(change) else change
        text = text if isinstance(text, str) else json.dumps(text)
        return struct.pack("<Q", len(text)) + text.encode() + data[8 + size :]

    return bytes_of(write)


def entry_with(**fields):
    return header(lambda old: old | {WEIGHT: old[WEIGHT] | fields})


def replaced_by(name, make):
    def write(folder):
        (folder / name).unlink()
        make(folder / name)

    return write


def text_of(name, change):
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def configured(**fields):
    return text_of("config.json", lambda text: json.dumps(json.loads(text) | fields))


def row(number, change):
    def lines(text):
        rows = text.splitlines()
        rows[number] = change(rows[number])
        return "\n".join(rows) + "\n"

    return text_of("metrics.csv", lines)


def special(name):
    """Replace the file by one that is not a regular file."""
    return {
        f"{name} is a folder": (replaced_by(name, Path.mkdir), name),
        f"{name} is a pipe": (replaced_by(name, os.mkfifo), name),
    }


def flipped(data):
    """Flip a bit of a weight, which remains finite."""
    size = struct.unpack("<Q", data[:8])[0]
    place = 8 + size + json.loads(data[8 : 8 + size])[WEIGHT]["data_offsets"][0]
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


MOMENT, SECOND, STEP = "optimizer.3.exp_avg", "optimizer.3.exp_avg_sq", "optimizer.3.step"
GOOD = '{"update": 10, "seconds": 1.5}'

# For each kind: the function that breaks the folder, and a pattern of the message.
BROKEN_CHECKPOINTS = {
    **special(CHECKPOINT),
    "a link to nothing": (
        replaced_by(CHECKPOINT, lambda path: path.symlink_to("nowhere")),
        "regular file|which has no",
    ),
    "empty": (bytes_of(lambda data: b""), "cannot be read"),
    "the first half": (bytes_of(lambda data: data[: len(data) // 2]), "cannot be read"),
    "without the last byte": (bytes_of(lambda data: data[:-1]), "cannot be read"),
    "more at its end": (bytes_of(lambda data: data + b"more"), "cannot be read"),
    "text": (bytes_of(lambda data: b"no checkpoint"), "cannot be read"),
    "zeros": (bytes_of(lambda data: bytes(len(data))), "cannot be read"),
    "a header of 2^63 bytes": (bytes_of(lambda data: struct.pack("<Q", 2**63) + data[8:]), "cannot be read"),
    "a header beyond the end": (bytes_of(lambda data: struct.pack("<Q", len(data)) + data[8:]), "cannot be read"),
    "a header that is not JSON": (header("{"), "cannot be read"),
    "a header that is a list": (header("[]"), "cannot be read"),
    "a header that is deep": (header("[" * 100_000), "cannot be read"),
    "metadata of other types": (
        header(lambda old: old | {"__metadata__": {"progress": {"update": 10}}}),
        "cannot be read",
    ),
    "an unknown type": (entry_with(dtype="F99"), "cannot be read"),
    "a shape that overflows": (entry_with(shape=[2**62, 2**62]), "cannot be read"),
    "a negative shape": (entry_with(shape=[-1]), "cannot be read"),
    "offsets that overlap": (entry_with(data_offsets=[0, 4]), "cannot be read"),
    "without metadata": (header(lambda old: {n: e for n, e in old.items() if n != "__metadata__"}), "no checksum"),
    "without a checksum": (lambda folder: rewritten(folder, lambda tensors: None, checksum=None), "no checksum"),
    "another checksum": (
        lambda folder: rewritten(folder, lambda tensors: None, checksum="crc32:0"),
        "the checksum crc32",
    ),
    "a flipped bit": (bytes_of(flipped), "the checksum crc32"),
    "progress that is not JSON": (progress("{"), "progress is not JSON"),
    "progress that is empty": (progress(""), "progress is not JSON"),
    "progress that is deep": (progress("[" * 100_000), "progress is not JSON"),
    "progress that is a list": (progress("[1]"), "progress is not a JSON object"),
    "without update": (progress('{"seconds": 1.5}'), "expected the update of its progress .*, got None"),
    "update -1": (progress('{"update": -1, "seconds": 1.5}'), "the update of its progress .*, got -1"),
    "update true": (progress('{"update": true, "seconds": 1.5}'), "the update of its progress .*, got True"),
    "update 1.5": (progress('{"update": 1.5, "seconds": 1.5}'), "the update of its progress .*, got 1.5"),
    "update as text": (progress('{"update": "10", "seconds": 1.5}'), "the update of its progress .*, got '10'"),
    "update of 30 digits": (
        progress(f'{{"update": {10**30}, "seconds": 1.5}}'),
        "the update of its progress .*, got 1000",
    ),
    "update of 5000 digits": (progress(f'{{"update": 1{"0" * 5000}, "seconds": 1.5}}'), "progress is not JSON"),
    "without seconds": (progress('{"update": 10}'), "the seconds of its progress .*, got None"),
    "seconds NaN": (progress('{"update": 10, "seconds": NaN}'), "the seconds of its progress .*, got nan"),
    "seconds infinite": (progress('{"update": 10, "seconds": 1e999}'), "the seconds of its progress .*, got inf"),
    "seconds -1": (progress('{"update": 10, "seconds": -1}'), "the seconds of its progress .*, got -1"),
    "seconds of 400 digits": (
        progress(f'{{"update": 10, "seconds": {10**400}}}'),
        "the seconds of its progress .*, got 1000",
    ),
    "seconds as a list": (progress('{"update": 10, "seconds": [1]}'), "the seconds of its progress .*, got"),
    "a weight is missing": (without(WEIGHT), f"'{WEIGHT}' is missing"),
    "a weight too many": (changed("model.more", torch.zeros(1)), "'model.more' is unknown"),
    "a weight of fewer elements": (changed(WEIGHT, torch.zeros(1)), rf"'{WEIGHT}' has shape \[1\], expected \["),
    "a weight of more elements": (changed(WEIGHT, torch.zeros(99, 99)), f"'{WEIGHT}' has shape"),
    "a weight transposed": (changed(WEIGHT, lambda tensor: tensor.transpose(0, 1)), f"'{WEIGHT}' has shape"),
    "a weight in float64": (changed(WEIGHT, torch.Tensor.double), f"'{WEIGHT}' has dtype torch.float64, expected"),
    "a weight in int32": (changed(WEIGHT, torch.Tensor.int), f"'{WEIGHT}' has dtype torch.int32"),
    "a weight that is NaN": (changed(WEIGHT, with_first(torch.nan)), f"'{WEIGHT}' has values that are not finite"),
    "a weight that is infinite": (changed(WEIGHT, with_first(torch.inf)), f"'{WEIGHT}' has values"),
    "a buffer is missing": (without(USE), f"'{USE}' is missing"),
    "a buffer too many": (changed("buffer.more", torch.zeros(1)), "'buffer.more' is unknown"),
    "a buffer of fewer elements": (changed(USE, torch.zeros(1)), rf"'{USE}' has shape \[1\], expected \["),
    "a buffer that is NaN": (changed(USE, with_first(torch.nan)), f"'{USE}' has values that are not finite"),
    "without optimizer state": (partial(rewritten, change=without_optimizer), "'optimizer.0.step' is missing"),
    "a moment is missing": (without(MOMENT), f"'{MOMENT}' is missing"),
    "a second moment is missing": (without(SECOND), f"'{SECOND}' is missing"),
    "a step is missing": (without(STEP), f"'{STEP}' is missing"),
    "a moment of one element": (changed(MOMENT, torch.zeros(1)), rf"'{MOMENT}' has shape \[1\], expected"),
    "a second moment of no element": (changed(SECOND, torch.zeros(0)), rf"'{SECOND}' has shape \[0\], expected"),
    "a moment of more elements": (changed(MOMENT, torch.zeros(10_000)), f"'{MOMENT}' has shape"),
    "all moments of one element": (partial(rewritten, change=all_moments_of_one_element), "has shape"),
    "a moment in float64": (changed(MOMENT, torch.Tensor.double), f"'{MOMENT}' has dtype"),
    "a moment in float16": (changed(SECOND, torch.Tensor.half), f"'{SECOND}' has dtype"),
    "a moment that is NaN": (changed(MOMENT, with_first(torch.nan)), f"'{MOMENT}' has values that are not finite"),
    "a second moment that is infinite": (changed(SECOND, with_first(torch.inf)), f"'{SECOND}' has values"),
    "a second moment below 0": (changed(SECOND, with_first(-1.0)), f"'{SECOND}' has values below 0"),
    "a step that is NaN": (changed(STEP, with_first(torch.nan)), f"'{STEP}' has values that are not finite"),
    "a step below 0": (changed(STEP, with_first(-1.0)), f"'{STEP}' has values below 0"),
    "a step with a dimension": (changed(STEP, torch.zeros(1)), f"'{STEP}' has shape"),
    "a step in int64": (changed(STEP, torch.Tensor.long), f"'{STEP}' has dtype"),
    "a step for another parameter": (changed("optimizer.999.step", torch.zeros(())), "'optimizer.999.step' is unknown"),
    "another optimizer": (changed("optimizer.0.square_avg", torch.zeros(())), "'optimizer.0.square_avg' is unknown"),
    "an unknown entry": (changed("more", torch.zeros(())), "'more' is unknown"),
    "without a random state": (without("rng.cpu"), "'rng.cpu' is missing"),
    "a random state in int64": (changed("rng.cpu", torch.Tensor.long), "'rng.cpu' has dtype"),
    "a shorter random state": (changed("rng.cpu", lambda state: state[:-1]), "'rng.cpu' has shape"),
    "a random state of ones": (
        changed("rng.cpu", torch.Tensor.bitwise_not),
        "'rng.cpu' is not a state of a random generator",
    ),
    "a shorter state of a GPU": (changed("rng.cuda", torch.zeros(3, dtype=torch.uint8)), "'rng.cuda' has shape"),
}
BROKEN_CONFIGURATIONS = {
    **special("config.json"),
    "config.json empty": (text_of("config.json", lambda text: ""), "config.json is not the configuration"),
    "config.json cut": (text_of("config.json", lambda text: text[:99]), "config.json is not the configuration"),
    "config.json binary": (replaced_by("config.json", lambda path: path.write_bytes(b"\xff\0")), "is not the config"),
    "config.json deep": (text_of("config.json", lambda text: "[" * 100_000), "config.json is not the configuration"),
    "config.json a list": (text_of("config.json", lambda text: "[1]"), "not a JSON object"),
    "config.json null": (text_of("config.json", lambda text: "null"), "not a JSON object"),
    "an unknown key": (configured(more=1), "'more' is unknown"),
    "a missing key": (text_of("config.json", lambda text: '{"lr": 1.0}'), "model is missing"),
    "lr null": (configured(lr=None), "expected lr to be a number, got None"),
    "lr NaN": (configured(lr=float("nan")), r"expected lr to lie in .*, got nan"),
    "decay NaN": (configured(decay=float("nan")), "expected decay to lie in .*, got nan"),
    "updates as text": (configured(updates="many"), "expected updates to be an integer, got 'many'"),
    "updates true": (configured(updates=True), "expected updates to be an integer, got True"),
    "updates 1.5": (configured(updates=1.5), "expected updates to be an integer, got 1.5"),
    "updates of 30 digits": (configured(updates=10**30), "expected updates to be an integer in .*, got 10+"),
    "compile as text": (configured(compile="no"), "expected compile to be true or false, got 'no'"),
    "data a list": (configured(data=["patches"]), r"expected data to be a string, got \['patches'\]"),
    "data of another folder": (configured(data="folder:/nowhere"), "got /nowhere, which is not a folder"),
    "seed -1": (configured(seed=-1), "expected seed to be an integer in .*, got -1"),
    "threshold of text": (
        configured(dead_code_threshold="1"),
        "expected dead_code_threshold to be 'auto' or a number of at least 0, got '1'",
    ),
    "model unknown": (configured(model="gan"), "expected model to be one of .*, got 'gan'"),
    "model null": (configured(model=None), "expected model to be a string, got None"),
    "another model": (configured(model="dlvae"), r"checkpoint.safetensors is not .* 'model._dl.dictionary' is missing"),
    "other sizes": (configured(hiddens=32), "has shape"),
    "sizes beyond the memory": (configured(num_embeddings=2**31 - 1, embedding_dim=4096), "the model needs at least"),
    "sizes beyond 64 bits": (
        configured(hiddens=2**31 - 1, embedding_dim=2**31 - 1),
        r"the model needs more than 2\^63 bytes",
    ),
}
BROKEN_METRICS = {
    **special("metrics.csv"),
    "metrics.csv empty": (text_of("metrics.csv", lambda text: ""), "line 1 of .*metrics.csv"),
    "another header": (row(0, lambda line: "a,b,c,d,e"), "line 1 of .*metrics.csv"),
    "a row of text": (row(3, lambda line: "3,a,b,c,d,e,f,g"), "line 4 of .*metrics.csv"),
    "a row without its usage": (row(3, lambda line: "3,1,1,1,1"), "line 4 of .*metrics.csv"),
    "a usage of text": (row(3, lambda line: "3,1,1,1,1,a,1,1"), "line 4 of .*metrics.csv"),
    "a row cut": (row(3, lambda line: line[:4]), "line 4 of .*metrics.csv"),
    "a row too long": (row(3, lambda line: line + ",1"), "line 4 of .*metrics.csv"),
    "a row of NaN": (row(3, lambda line: "3,nan,1,1,1,1,1,1"), "line 4 of .*metrics.csv"),
    "a row twice": (row(3, lambda line: "2,1,1,1,1,1,1,1"), "line 4 of .*metrics.csv"),
    "a row of digits that are no number": (row(3, lambda line: "²,1,1,1,1,1,1,1"), "line 4 of .*metrics.csv"),
    "bytes that are no text": (
        lambda folder: (folder / "metrics.csv").write_bytes(b"update,nmse,loss,perplexity,lr\n\xff\xfe\n"),
        "line 2 of .*metrics.csv",
    ),
}


def load_all(run: Path) -> None:
    """Load each kind of broken checkpoint; if that raises no error, take steps with the loaded state."""
    for name, (break_run, _) in BROKEN_CHECKPOINTS.items():
        if name.endswith("is a pipe"):
            continue
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(shutil.copytree(run, Path(parent) / "run"))
            break_run(folder)
            loaded = Run(Config.read(run / "config.json"), folder)
            try:
                checkpoint.load(folder / CHECKPOINT, loaded.model, loaded.optimizer)
                print(f"{name}: loaded", flush=True)
                for parameter in loaded.model.parameters():
                    parameter.grad = torch.ones_like(parameter)
                for _ in range(3):
                    loaded.optimizer.step()
            except Exception as error:
                print(f"{name}: {type(error).__name__}", flush=True)


if __name__ == "__main__":
    load_all(Path(sys.argv[1]))

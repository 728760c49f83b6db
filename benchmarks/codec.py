"""Train the audio codec of examples/ with the residual quantizers of two libraries, which take turns in one process.

All codecs share the updates without a quantizer, then see the same crops. Times are processor times of one thread,
means over the updates with a quantizer but the first, which has k-means. Quantizer dropout runs another number of
levels in each update. quantizer_ms: forward and backward pass of the quantizer, with the update of its codes. A ratio
is to the time of dlvae_kernels.

Functions import examples/ when they run, as collapse.py imports models/.
"""

from __future__ import annotations

import copy
import hashlib
import statistics
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import results
from .entry import LIBRARY
from .results import Row

if TYPE_CHECKING:
    from examples.audio_codec import Trainer

PATH = results.FOLDER / "codec-cpu.csv"
FIGURE = results.ROOT / "docs" / "images" / "audio-codec.png"
_VQP = "vector-quantize-pytorch"
_RATE = 16000
_AVERAGED = (
    *("levels", "kbit_per_s", "si_sdr_db", "spectral_distance"),
    *("step_ms", "step_ratio", "quantizer_ms", "quantizer_ratio"),
)


def quantizers() -> dict[str, Callable[[], nn.Module]]:
    """The constructors of the quantizers by implementation."""
    from examples.audio_codec import new_quantizer
    from examples.audio_codec_vqp import LIBRARIES, ResidualVQAdapter

    vqp, compat = LIBRARIES
    return {
        LIBRARY: new_quantizer,
        f"{LIBRARY}, ResidualVQ": partial(ResidualVQAdapter, compat),
        _VQP: partial(ResidualVQAdapter, vqp),
        f"{_VQP}, no rotation": partial(ResidualVQAdapter, vqp, rotation_trick=False),
    }


def timed_step(trainer: Trainer) -> tuple[float, float]:
    """`Trainer.step`, with its milliseconds and those of the quantizer."""
    from examples import audio_codec

    codec = trainer.codec
    begin = process_time()
    signals = audio_codec.crops(trainer.utterances, trainer.length, trainer.generator)
    latents = codec.encoder(signals)
    inputs = latents.detach().requires_grad_()
    begin_forward = process_time()
    quantizer_loss, quantized, *_ = codec.quantizer(inputs)
    end_forward = process_time()
    decoder_inputs = quantized.detach().requires_grad_()
    audio_codec.reconstruction_loss(signals, codec.decoder(decoder_inputs)).backward()
    begin_backward = process_time()
    torch.autograd.backward([quantizer_loss, quantized], [None, decoder_inputs.grad])
    end_backward = process_time()
    latents.backward(inputs.grad)
    trainer.update()
    quantizer = end_forward - begin_forward + end_backward - begin_backward
    return 1000 * (process_time() - begin), 1000 * quantizer


def _rows(wav: Path | None, steps: int, seed: int) -> list[Row]:
    """Train all codecs with one seed: a row for each codec and number of levels."""
    from examples import audio_codec

    training, held_out = audio_codec.load(wav, _RATE, audio_codec.CACHE)
    warm = audio_codec.Trainer(nn.Identity, training, steps, _RATE, seed)
    while not warm.is_warm:
        warm.step()
    trainers = {name: _continued(warm, new) for name, new in quantizers().items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for step in range(warm.steps_done, steps):
        for name, trainer in trainers.items():
            times[name].append(timed_step(trainer))
        print(f"seed {seed}, step {step + 1}", flush=True)
    rows = []
    means = {
        name: [statistics.mean(column) for column in zip(*found[1:], strict=True)] for name, found in times.items()
    }
    for name, trainer in trainers.items():
        columns: Row = {"implementation": name, "seed": seed, "steps": steps}
        for column, own, base in zip(("step", "quantizer"), means[name], means[LIBRARY], strict=True):
            columns |= {f"{column}_ms": f"{own:.4g}", f"{column}_ratio": f"{own / base:.3f}"}
        if name.startswith(_VQP):
            columns["package"] = _VQP
        for found in audio_codec.evaluate(trainer.codec, held_out, _RATE):
            rows.append({**columns, **{key: f"{value:.6g}" for key, value in found.items()}})
    return rows


def _continued(warm: Trainer, new_quantizer: Callable[[], nn.Module]) -> Trainer:
    """A copy of a trainer after the warm-up, with a new quantizer."""
    trainer = copy.deepcopy(warm)
    trainer.codec.quantizer = new_quantizer()
    return trainer


def write(wav: Path | None, steps: int, seeds: list[int], path: Path) -> None:
    """Train with all seeds and write the rows to a CSV file."""
    torch.set_num_threads(1)
    rows = [row for seed in seeds for row in _rows(wav, steps, seed)]
    table = results.completed(rows, torch.device("cpu"))
    with results.writing(path, table[0]) as add:
        add(table)


def by_level(rows: list[Row]) -> dict[str, list[dict[str, float]]]:
    """The means of the rows of each implementation over the seeds, a row for each number of levels."""
    curves: dict[str, list[dict[str, float]]] = {}
    for name in dict.fromkeys(row["implementation"] for row in rows):
        own = sorted((row for row in rows if row["implementation"] == name), key=_levels)
        curves[name] = [
            {key: statistics.mean(float(row[key]) for row in runs) for key in _AVERAGED}
            for runs in (list(group) for _, group in groupby(own, _levels))
        ]
    return curves


def _levels(row: Row) -> int:
    return int(row["levels"])


def draw(path: Path = PATH, figure: Path = FIGURE) -> None:
    """The rate-distortion curves of the rows, means over the seeds, as a PNG file with the hash of the rows."""
    from examples import audio_codec

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    curves = by_level(results.read(path))
    audio_codec.rate_distortion(curves).savefig(figure, dpi=80, metadata={"Source": digest})

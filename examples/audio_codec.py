"""Train a neural audio codec in minutes on two CPU cores: `python -m examples.audio_codec`.

A convolutional encoder turns the signal into 100 frames a second, a residual quantizer assigns each frame to L codes,
and a decoder returns the signal. The first n codes alone decode to a coarser signal, so that the bit rate is chosen at
inference. The speech is that of espeak-ng, or --wav FOLDER; whole sentences, or files, are held out.

Sources: Zeghidour et al. 2021, arXiv:2107.03312 (SoundStream); Defossez et al. 2022, arXiv:2210.13438 (EnCodec). There
are no discriminators here.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor, nn
from torch.nn import functional as F

from dlvae_kernels import ResidualVectorQuantizer

# The encoder: the stride and the width of each of its convolutions. A frame has as many samples as the product.
STRIDES = (8, 5, 4)
WIDTHS = (32, 64, 128)
NUM_FEATURES, NUM_CODES, NUM_LEVELS = 128, 1024, 8
COMMITMENT_COST, DECAY = 0.25, 0.95
BATCH, SECONDS = 16, 0.65  # crops in an update, and their length
LEARNING_RATE = 2e-3
WARM_UP = 0.4  # part of the updates, the first, without a quantizer; then k-means finds its codes
WAVEFORM_WEIGHT, SPECTRAL_WEIGHT = 50, 0.5
WINDOWS = (256, 1024)  # of the spectral loss, in samples
HELD_OUT = 8  # One of so many sentences, or files, is held out.
HEARD_LEVELS = (1, 2, 4, 8)  # the bit rates of the audio files and spectrograms

HOP = math.prod(STRIDES)
CACHE = Path("data/espeak-ng")  # the speech of espeak-ng
SENTENCES = Path(__file__).with_name("sentences.txt")
# The variant, pitch and words per minute of each voice of espeak-ng.
VOICES = (
    *(("m1", 40, 150), ("f2", 55, 165), ("m3", 30, 140), ("f4", 60, 175)),
    *(("m7", 50, 185), ("f5", 45, 150), ("m4", 65, 160), ("f3", 70, 170)),
)
VOICES_OF_A_SENTENCE = 4


class Utterance(NamedTuple):
    """A mono signal in [-1, 1]; utterances of one group are held out together."""

    name: str
    group: int
    signal: Tensor


# Data


def read_wav(path: Path, sample_rate: int) -> Tensor:
    """A WAV file as float32 mono at `sample_rate`, with a peak of 0.9.

    Raises:
        ValueError: the file is no WAV file, is silent, or has samples that are not finite.
    """
    try:
        rate, samples = wavfile.read(path)
    except ValueError as error:
        raise ValueError(f"expected a WAV file of PCM or float samples, got {path} ({error})") from error
    if samples.dtype == np.uint8:
        samples = samples.astype(np.float64) - 128
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    common = math.gcd(rate, sample_rate)
    samples = resample_poly(samples.astype(np.float64), sample_rate // common, rate // common)
    peak = np.abs(samples).max(initial=0)
    if not 0 < peak < math.inf:
        raise ValueError(f"expected a signal with finite samples that are not all zero, got {path}")
    return torch.from_numpy(0.9 * samples / peak).float()


def write_wav(path: Path, signal: Tensor, sample_rate: int) -> None:
    """Write a signal in [-1, 1] as 16-bit PCM."""
    wavfile.write(path, sample_rate, (signal.clamp(-1, 1) * 32767).round().short().numpy())


def speak(folder: Path) -> list[tuple[Path, int]]:
    """WAV files of all sentences, spoken by espeak-ng in several voices, with the number of the sentence.

    Raises:
        FileNotFoundError: espeak-ng is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, line in enumerate(SENTENCES.read_text(encoding="utf-8").splitlines()):
        language, text = line.split("\t")
        for turn in range(VOICES_OF_A_SENTENCE):
            variant, pitch, speed = VOICES[(number + 2 * turn + turn // 2) % len(VOICES)]
            path = folder / f"{number:02}-{language}-{variant}.wav"
            files.append((path, number))
            if path.exists():
                continue
            if shutil.which("espeak-ng") is None:
                raise FileNotFoundError(
                    "expected the program espeak-ng, which speaks the sentences, got none;"
                    " install it (apt-get install espeak-ng), or pass --wav FOLDER"
                )
            options = ["-v", f"{language}+{variant}", "-p", str(pitch), "-s", str(speed), "-w", str(path)]
            subprocess.run(["espeak-ng", *options, text], check=True)
    return files


def load(folder: Path | None, sample_rate: int, cache: Path) -> tuple[list[Utterance], list[Utterance]]:
    """The utterances to train with and those that are held out.

    Raises:
        ValueError: the folder has fewer than two WAV files, or one that is shorter than a crop.
    """
    files = speak(cache) if folder is None else [(path, i) for i, path in enumerate(sorted(folder.rglob("*.wav")))]
    if len(files) < 2:
        raise ValueError(f"expected at least two files *.wav, one of which is held out, got {len(files)} in {folder}")
    found = [Utterance(path.stem, group, read_wav(path, sample_rate)) for path, group in files]
    for (path, _), utterance in zip(files, found, strict=True):
        if len(utterance.signal) < SECONDS * sample_rate:
            seconds = len(utterance.signal) / sample_rate
            raise ValueError(f"expected files of at least {SECONDS} s, got {seconds:.2f} s in {path}")
    return [u for u in found if u.group % HELD_OUT], [u for u in found if not u.group % HELD_OUT]


def crops(utterances: list[Utterance], length: int, generator: torch.Generator) -> Tensor:
    """Random crops of random utterances, [BATCH, 1, length]."""
    chosen = torch.randint(len(utterances), (BATCH,), generator=generator).tolist()
    starts = torch.rand(BATCH, generator=generator).tolist()
    signals = [utterances[i].signal for i in chosen]
    begins = [int(s * (len(signal) - length + 1)) for s, signal in zip(starts, signals, strict=True)]
    return torch.stack([signal[b : b + length] for b, signal in zip(begins, signals, strict=True)])[:, None]


# Model


class ResidualUnit(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide, pointwise = nn.Conv1d(width, width, 7, padding=3), nn.Conv1d(width, width, 1)
        self.layers = nn.Sequential(nn.ELU(), wide, nn.ELU(), pointwise)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def strided(kind: Callable[..., nn.Module], channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """A convolution, or a transposed one, that divides, or multiplies, the length by its stride exactly."""
    kernel = 2 * stride + stride % 2
    return kind(channels_in, channels_out, kernel, stride, (kernel - stride) // 2)


class Codec(nn.Module):
    """Encoder, decoder and quantizer, which has the interface of `ResidualVectorQuantizer`."""

    def __init__(self, new_quantizer: Callable[[], nn.Module]) -> None:
        super().__init__()
        encoder: list[nn.Module] = [strided(nn.Conv1d, 1, WIDTHS[0], STRIDES[0]), ResidualUnit(WIDTHS[0])]
        for stride, narrow, wide in zip(STRIDES[1:], WIDTHS, WIDTHS[1:], strict=False):
            encoder += [nn.ELU(), strided(nn.Conv1d, narrow, wide, stride), ResidualUnit(wide)]
        self.encoder = nn.Sequential(*encoder, nn.ELU(), nn.Conv1d(WIDTHS[-1], NUM_FEATURES, 3, padding=1))
        decoder: list[nn.Module] = [nn.Conv1d(NUM_FEATURES, WIDTHS[-1], 7, padding=3), ResidualUnit(WIDTHS[-1])]
        for stride, narrow, wide in reversed(list(zip(STRIDES[1:], WIDTHS, WIDTHS[1:], strict=False))):
            decoder += [nn.ELU(), strided(nn.ConvTranspose1d, wide, narrow, stride), ResidualUnit(narrow)]
        self.decoder = nn.Sequential(*decoder, nn.ELU(), strided(nn.ConvTranspose1d, WIDTHS[0], 1, STRIDES[0]))
        self.quantizer: Any = new_quantizer()

    @torch.no_grad()
    def encode(self, signal: Tensor) -> Tensor:
        """The indices [frames, L] of a signal [samples]."""
        padded = F.pad(signal, (0, -len(signal) % HOP))
        return self.quantizer.encode(self.encoder(padded[None, None]))[0]

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """The signal [frames * HOP] of the indices [frames, n] of the first n levels."""
        return self.decoder(self.quantizer.decode(indices[None]))[0, 0]


def new_quantizer() -> nn.Module:
    return ResidualVectorQuantizer(
        NUM_LEVELS, NUM_CODES, NUM_FEATURES, COMMITMENT_COST, DECAY, quantizer_dropout=True, init="kmeans"
    )


# Losses and metrics


def spectrum(signals: Tensor, size: int) -> Tensor:
    """The short-time Fourier transform of signals [..., samples], with windows of `size` samples."""
    window = torch.hann_window(size, device=signals.device)
    return torch.stft(signals, size, size // 4, window=window, normalized=True, return_complex=True)


def spectral_loss(reference: Tensor, estimate: Tensor) -> Tensor:
    """Mean absolute difference of STFT magnitudes and of their logarithms, over windows of several sizes."""
    signals = torch.stack([reference, estimate]).flatten(0, -2)
    losses = []
    for size in WINDOWS:
        expected, found = spectrum(signals, size).abs().chunk(2)
        losses += [F.l1_loss(found, expected), F.l1_loss((found + 1e-3).log(), (expected + 1e-3).log())]
    return torch.stack(losses).sum() / len(WINDOWS)


def si_sdr(reference: Tensor, estimate: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in decibels, [...] of signals [..., samples].

    Source: Le Roux et al. 2019, arXiv:1811.02508, section 2.2.
    """
    reference = reference - reference.mean(-1, keepdim=True)
    estimate = estimate - estimate.mean(-1, keepdim=True)
    energy = reference.square().sum(-1, keepdim=True)
    target = (estimate * reference).sum(-1, keepdim=True) / energy.clamp(min=1e-12) * reference
    distortion = (estimate - target).square().sum(-1)
    return 10 * (target.square().sum(-1).clamp(min=1e-12) / distortion.clamp(min=1e-12)).log10()


def bit_rate(num_levels: int, sample_rate: int) -> float:
    """kbit/s of `num_levels` codes for each frame, at a fixed code length."""
    return num_levels * math.log2(NUM_CODES) * sample_rate / HOP / 1000


# Training and evaluation


def reconstruction_loss(signals: Tensor, decoded: Tensor) -> Tensor:
    """The losses of the waveform and of its spectra."""
    return WAVEFORM_WEIGHT * F.l1_loss(decoded, signals) + SPECTRAL_WEIGHT * spectral_loss(signals, decoded)


class Trainer:
    """A codec, its optimizer, and the random crops that it is trained with."""

    def __init__(
        self, new_quantizer: Callable[[], nn.Module], utterances: list[Utterance], steps: int, rate: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.codec = Codec(new_quantizer)
        self.optimizer = torch.optim.Adam(self.codec.parameters(), LEARNING_RATE, betas=(0.8, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        self.steps, self.steps_done = steps, 0
        self.utterances = utterances
        self.length = int(SECONDS * rate) // HOP * HOP
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def is_warm(self) -> bool:
        """Whether the next update has the quantizer."""
        return self.steps_done >= WARM_UP * self.steps

    def step(self) -> Tensor:
        """Update the codec once and return the loss."""
        signals = crops(self.utterances, self.length, self.generator)
        latents = self.codec.encoder(signals)
        quantizer_loss, quantized = latents.new_zeros(()), latents
        if self.is_warm:
            quantizer_loss, quantized, *_ = self.codec.quantizer(latents)
        loss = quantizer_loss + reconstruction_loss(signals, self.codec.decoder(quantized))
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        """Apply the gradients and clear them."""
        nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.steps_done += 1
        self.optimizer.zero_grad()


def evaluate(codec: Codec, utterances: list[Utterance], rate: int) -> list[dict[str, float]]:
    """Mean SI-SDR and spectral distance of held-out utterances, for each number of levels."""
    codec.eval()
    coded = [(utterance.signal, codec.encode(utterance.signal)) for utterance in utterances]
    rows = []
    for n in range(1, NUM_LEVELS + 1):
        pairs = [(signal, codec.decode(indices[:, :n])[: len(signal)]) for signal, indices in coded]
        rows.append(
            {
                "levels": n,
                "kbit_per_s": bit_rate(n, rate),
                "si_sdr_db": statistics.mean(si_sdr(*pair).item() for pair in pairs),
                "spectral_distance": statistics.mean(spectral_loss(*pair).item() for pair in pairs),
            }
        )
    return rows


# Outputs


def write_examples(codec: Codec, utterances: list[Utterance], rate: int, out: Path) -> None:
    """The WAV files and spectrograms of a few utterances, original and decoded at several bit rates."""
    audio = out / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(14, 2.4 * len(utterances)), layout="constrained")
    panels = figure.subplots(len(utterances), len(HEARD_LEVELS) + 1, sharey=True, squeeze=False)
    for (name, _, signal), row in zip(utterances, panels, strict=True):
        indices = codec.encode(signal)
        heard = {"original": signal}
        for n in HEARD_LEVELS:
            heard[f"{bit_rate(n, rate):g} kbit/s"] = codec.decode(indices[:, :n])[: len(signal)]
        for axes, (title, each) in zip(row, heard.items(), strict=True):
            write_wav(audio / f"{name}-{title.replace(' kbit/s', 'k')}.wav", each, rate)
            decibels = 20 * (spectrum(each, 512).abs() + 1e-4).log10().numpy()
            extent = (0, len(signal) / rate, 0, rate / 2000)
            axes.imshow(decibels, vmin=-60, vmax=20, origin="lower", aspect="auto", extent=extent)
            axes.set(title=title, xlabel="s")
        row[0].set_ylabel("kHz")
    figure.savefig(out / "spectrograms.png", dpi=80)


def rate_distortion(curves: dict[str, list[dict[str, float]]]) -> Figure:
    """SI-SDR and spectral distance against the bit rate, a curve for each codec."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    columns = {"si_sdr_db": "held-out SI-SDR, dB", "spectral_distance": "held-out spectral distance"}
    for axes, (column, label) in zip(figure.subplots(1, 2), columns.items(), strict=True):
        for name, rows in curves.items():
            axes.plot(*([float(row[key]) for row in rows] for key in ("kbit_per_s", column)), marker="o", label=name)
        axes.set(xlabel="kbit/s", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def table(rows: list[dict[str, float]]) -> str:
    lines = ["levels  kbit/s  SI-SDR, dB  spectral distance"]
    lines += ["{levels:6}  {kbit_per_s:6g}  {si_sdr_db:10.2f}  {spectral_distance:17.3f}".format(**row) for row in rows]
    return "\n".join(lines)


# Command


def parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--wav", type=Path, help="folder of WAV files; default: speech of espeak-ng")
    options.add_argument("--sample-rate", type=int, choices=(16000, 24000), default=16000, help="of the codec, in Hz")
    options.add_argument("--steps", type=int, default=1000, help="updates of the training")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    options.add_argument("--out", type=Path, default=Path("runs/audio-codec"), help="folder of the outputs")
    return options


def run(given: argparse.Namespace, new_quantizer: Callable[[], nn.Module]) -> None:
    """Train a codec, evaluate it on what was held out, and write all outputs; `load` says what it raises."""
    torch.set_num_threads(given.threads)
    training, held_out = load(given.wav, given.sample_rate, CACHE)
    trainer = Trainer(new_quantizer, training, given.steps, given.sample_rate, given.seed)
    seconds = []
    for step in range(given.steps):
        begin = time.perf_counter()
        loss = trainer.step()
        seconds.append(time.perf_counter() - begin)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {sum(seconds):.0f} s", flush=True)
    rows = evaluate(trainer.codec, held_out, given.sample_rate)
    given.out.mkdir(parents=True, exist_ok=True)
    write_examples(trainer.codec, held_out[:: max(1, len(held_out) // 3)][:3], given.sample_rate, given.out)
    rate_distortion({"codec": rows}).savefig(given.out / "rate-distortion.png", dpi=80)
    settings = {name: getattr(given, name) for name in ("steps", "seed", "sample_rate", "threads")}
    metrics = {**settings, "median_step_ms": 1000 * statistics.median(seconds), "held_out": rows}
    (given.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(table(rows), f"outputs: {given.out}", sep="\n")


def command(given: argparse.Namespace, new_quantizer: Callable[[], nn.Module]) -> int:
    """`run`, with errors as messages; the exit status."""
    try:
        run(given, new_quantizer)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command(parser().parse_args(), new_quantizer))

"""The audio codec of examples/: WAV files, metrics, and the outputs of both scripts."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from examples import audio_codec as codec
from examples import audio_codec_vqp

RATE = 16000


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tone(seconds: float = 1.0, rate: int = RATE, frequency: float = 440) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


@pytest.fixture
def folder(tmp_path):
    """Two WAV files of which the first is held out."""
    files = tmp_path / "wav"
    files.mkdir()
    for name, frequency in (("a", 440), ("b", 700)):
        wavfile.write(files / f"{name}.wav", RATE, tone(frequency=frequency).astype(np.float32))
    return files


@pytest.fixture
def tiny(monkeypatch):
    """A codec that one core trains in a second."""
    for name, value in {"WIDTHS": (4, 4, 4), "NUM_FEATURES": 8, "NUM_CODES": 16, "NUM_LEVELS": 3, "BATCH": 2}.items():
        monkeypatch.setattr(codec, name, value)
    monkeypatch.setattr(codec, "HEARD_LEVELS", (1, 3))


def options(folder, out, *words):
    return codec.parser().parse_args([*f"--steps 3 --threads 1 --wav {folder} --out {out}".split(), *words])


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        ((tone() * 32767).astype(np.int16), RATE),
        (tone().astype(np.float32), RATE),
        ((tone() * 127 + 128).round().astype(np.uint8), RATE),
        (np.stack([tone(), tone()], axis=1).astype(np.float32), RATE),
        (tone(rate=24000).astype(np.float32), 24000),
        (tone(rate=22050).astype(np.float32), 22050),
    ],
    ids=["int16", "float32", "uint8", "stereo", "24 kHz", "22.05 kHz"],
)
def test_read_wav_returns_the_mono_signal_at_the_given_rate(tmp_path, samples, rate):
    wavfile.write(tmp_path / "a.wav", rate, samples)
    signal = codec.read_wav(tmp_path / "a.wav", RATE)
    assert signal.dtype == torch.float32
    assert signal.shape == (RATE,)
    # The ends of a resampled signal ring, and 8-bit samples are coarse.
    inner = slice(200, -200)
    torch.testing.assert_close(signal[inner], torch.from_numpy(1.8 * tone()).float()[inner], atol=0.03, rtol=0)


def test_read_wav_stereo_returns_the_mean_of_the_channels(tmp_path):
    silent = np.zeros_like(tone())
    wavfile.write(tmp_path / "a.wav", RATE, np.stack([tone(), silent], axis=1).astype(np.float32))
    wavfile.write(tmp_path / "b.wav", RATE, np.stack([tone(), -tone()], axis=1).astype(np.float32))
    assert codec.read_wav(tmp_path / "a.wav", RATE).abs().max() == pytest.approx(0.9)
    with pytest.raises(ValueError, match="finite samples that are not all zero"):
        codec.read_wav(tmp_path / "b.wav", RATE)


@pytest.mark.parametrize("samples", [np.zeros(0, np.int16), np.full(16000, np.nan, np.float32)], ids=["empty", "nan"])
def test_read_wav_without_finite_samples_raises(tmp_path, samples):
    wavfile.write(tmp_path / "a.wav", RATE, samples)
    with pytest.raises(ValueError, match="finite samples"):
        codec.read_wav(tmp_path / "a.wav", RATE)


def test_read_wav_of_another_format_raises(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"no audio at all")
    with pytest.raises(ValueError, match=r"expected a WAV file of PCM or float samples, got .*a\.wav"):
        codec.read_wav(tmp_path / "a.wav", RATE)


def test_write_wav_clips_and_read_wav_reads_it(tmp_path):
    codec.write_wav(tmp_path / "a.wav", torch.tensor([0.5, 2.0, -2.0]), RATE)
    rate, samples = wavfile.read(tmp_path / "a.wav")
    assert (rate, samples.dtype, samples.tolist()) == (RATE, np.int16, [16384, 32767, -32767])


def test_load_without_enough_files_or_with_a_short_one_raises(tmp_path, folder):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="expected at least two files"):
        codec.load(tmp_path / "none", RATE, tmp_path)
    wavfile.write(folder / "short.wav", RATE, tone(0.5))
    with pytest.raises(ValueError, match=r"expected files of at least 0.65 s, got 0.50 s in .*short\.wav"):
        codec.load(folder, RATE, tmp_path)


def test_load_without_espeak_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(codec.shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"apt-get install espeak-ng.*--wav FOLDER"):
        codec.load(None, RATE, tmp_path)


def test_load_holds_out_whole_sentences(tmp_path, monkeypatch):
    monkeypatch.setattr(codec.shutil, "which", lambda name: name)

    def speak(words, check):
        codec.write_wav(words[words.index("-w") + 1], torch.from_numpy(tone()), RATE)

    monkeypatch.setattr(codec.subprocess, "run", speak)
    training, held_out = codec.load(None, RATE, tmp_path)
    assert {u.group for u in held_out} == set(range(0, 64, 8))
    assert {u.group for u in training} == set(range(64)) - set(range(0, 64, 8))
    voices = {u.name.split("-")[2] for u in training}
    assert voices == {variant for variant, _, _ in codec.VOICES}


def test_crops_lie_in_the_signals_and_depend_on_the_seed():
    utterances = [codec.Utterance("a", 1, torch.arange(100.0)), codec.Utterance("b", 1, torch.arange(200.0, 250))]
    found = [codec.crops(utterances, 50, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert found[0].shape == (codec.BATCH, 1, 50)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[0].diff(dim=-1), torch.ones(codec.BATCH, 1, 49))


def test_si_sdr_matches_a_float64_formula():
    generator = np.random.default_rng(0)
    reference, noise = generator.normal(size=(2, 5000))
    estimate = 3 * reference + 0.5 * noise + 2
    centred, e = reference - reference.mean(), estimate - estimate.mean()
    target = np.dot(e, centred) / np.dot(centred, centred) * centred
    expected = 10 * math.log10(np.sum(target**2) / np.sum((e - target) ** 2))
    found = codec.si_sdr(torch.from_numpy(reference).float(), torch.from_numpy(estimate).float())
    assert found.item() == pytest.approx(expected, abs=1e-3)
    assert expected == pytest.approx(20 * math.log10(6), abs=0.2)


def test_spectral_loss_of_equal_signals_is_zero_and_its_gradient_finite():
    signals = torch.randn(2, 1, 4000, generator=torch.Generator().manual_seed(0))
    assert codec.spectral_loss(signals, signals).item() == 0
    for estimate in (torch.zeros_like(signals), signals.clone(), 2 * signals):
        estimate.requires_grad_()
        codec.spectral_loss(signals, estimate).backward()
        assert estimate.grad.isfinite().all()
    assert codec.spectral_loss(signals, 2 * signals) > codec.spectral_loss(signals, 1.5 * signals) > 0


def test_bit_rate_counts_the_bits_of_the_levels():
    assert [codec.bit_rate(n, RATE) for n in (1, 8)] == [1.0, 8.0]
    assert codec.bit_rate(4, 24000) == 6.0


@pytest.mark.parametrize("length", [1600, 1601, 1759])
def test_codec_returns_whole_frames(tiny, length):
    trained = codec.Codec(codec.new_quantizer).eval()
    indices = trained.encode(torch.randn(length))
    assert indices.shape == (-(-length // codec.HOP), 3)
    assert trained.decode(indices[:, :1]).shape == (len(indices) * codec.HOP,)


@pytest.mark.parametrize(
    ("words", "quantizer"),
    [
        ([], codec.new_quantizer),
        (["--sample-rate", "24000"], codec.new_quantizer),
        ([], audio_codec_vqp.ResidualVQAdapter),
        ([], partial(audio_codec_vqp.ResidualVQAdapter, audio_codec_vqp.LIBRARIES[1], rotation_trick=False)),
    ],
    ids=["16 kHz", "24 kHz", "vector-quantize-pytorch", "compat"],
)
def test_smoke_run_writes_all_outputs(tiny, folder, tmp_path, capsys, words, quantizer):
    given = options(folder, tmp_path / "out", *words)
    assert codec.command(given, quantizer) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["levels", "kbit/s", "SI-SDR,", "dB", "spectral", "distance"]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert [row["levels"] for row in metrics["held_out"]] == [1, 2, 3]
    assert all(math.isfinite(value) for row in metrics["held_out"] for value in row.values())
    rate = given.sample_rate / RATE
    names = {f"a-{name}.wav" for name in ("original", f"{0.4 * rate:g}k", f"{1.2 * rate:g}k")}
    assert {path.name for path in (tmp_path / "out/audio").iterdir()} == names
    for path in (tmp_path / "out/audio").iterdir():
        assert wavfile.read(path)[1].shape == (given.sample_rate,)
    for name in ("spectrograms", "rate-distortion"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_training_is_deterministic_for_a_seed(tiny, folder, tmp_path):
    rows = []
    for seed in (0, 0, 1):
        given = options(folder, tmp_path / "out", "--seed", str(seed))
        codec.run(given, codec.new_quantizer)
        rows.append(json.loads((tmp_path / "out/metrics.json").read_text())["held_out"])
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_quantizer_begins_after_the_warm_up(tiny, folder, tmp_path):
    training, _ = codec.load(folder, RATE, tmp_path)
    trainer = codec.Trainer(codec.new_quantizer, training, 5, RATE, 0)
    before = trainer.codec.quantizer.codebooks.clone()
    changed = []
    for _ in range(4):
        trainer.step()
        changed.append(not torch.equal(trainer.codec.quantizer.codebooks, before))
    assert changed == [False, False, True, True]


def test_command_with_an_empty_folder_prints_the_error(tmp_path, capsys):
    assert codec.command(options(tmp_path, tmp_path / "out"), codec.new_quantizer) == 1
    assert capsys.readouterr().err.startswith("error: expected at least two files *.wav")

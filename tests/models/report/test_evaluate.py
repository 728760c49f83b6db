from __future__ import annotations

import numpy as np
import pytest
import torch

from models.dlvae import DictionaryLearningVAE
from models.report.evaluate import evaluate
from models.vqvae import VQVAE

SIZES = (16, 2, 4)
MODELS = {
    "vqvae": lambda: VQVAE(*SIZES, 32, 8, 0.25),
    "vqvae-ema": lambda: VQVAE(*SIZES, 32, 8, 0.25, 0.9, dead_code_threshold=1.0),
    "dlvae": lambda: DictionaryLearningVAE(*SIZES, 32, 8, 0.0, 5),
}


@pytest.mark.parametrize("name", MODELS)
def test_evaluate_equals_numpy(name):
    model = MODELS[name]()
    images = torch.randint(0, 256, (270, 3, 16, 16), dtype=torch.uint8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = evaluate(model, images, 0.07, torch.device("cpu"))
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        pixels = images.float() / 255
        latents = model.encode(pixels)
        error = float((model(pixels)[1] - pixels).double().square().mean())
        coding = model.code(latents)
    assert result.nmse == pytest.approx(error / 0.07, rel=1e-5)
    assert result.psnr == pytest.approx(10 * np.log10(1 / error), rel=1e-5)
    counts = np.bincount(coding.indices.numpy().ravel(), minlength=32)
    probability = counts[counts > 0] / counts.sum()
    assert result.counts.tolist() == counts.tolist()
    assert result.perplexity == pytest.approx(np.exp(-(probability * np.log(probability)).sum()))
    assert result.utilisation == (counts > 0).mean()
    assert result.nonzero == pytest.approx(5 / 32 if name == "dlvae" else 1 / 32)


def test_evaluate_with_any_number_of_threads_gives_the_same_error():
    model = MODELS["vqvae-ema"]()
    images = torch.randint(0, 256, (250, 3, 32, 32), dtype=torch.uint8)
    threads, errors = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            errors.add(evaluate(model, images, 0.07, torch.device("cpu")).nmse)
    finally:
        torch.set_num_threads(threads)
    assert len(errors) == 1

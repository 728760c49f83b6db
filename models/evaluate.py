"""Held-out figures of a trained model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .autoencoder import Autoencoder, perplexity

_BATCH_SIZE = 250


@dataclass(frozen=True)
class Evaluation:
    """Over all held-out images."""

    nmse: float  # mean squared error over the variance of the training pixels
    psnr: float  # decibels, of the mean squared error
    perplexity: float  # of the codes or atoms taken, in [1, K]
    in_use: float  # share of the codes or atoms taken at least once
    nonzero: float  # share of all coefficients (positions x K) that are not zero
    use: Tensor  # [K] int64, how often each code or atom was taken


@torch.inference_mode()
def evaluate(model: Autoencoder, images: Tensor, variance: float, device: torch.device) -> Evaluation:
    """Evaluate on uint8 images [N, C, H, W], in float32."""
    model.eval()
    num_codes = len(model.codes)
    use = torch.zeros(num_codes, dtype=torch.int64, device=device)
    squared_error = torch.zeros((), dtype=torch.float64, device=device)
    positions = nonzeros = 0
    for part in images.split(_BATCH_SIZE):
        batch = part.to(device).float() / 255
        coding = model.code(model.encode(batch))
        squared_error += (model.decode(coding.latents) - batch).square().sum()
        use += coding.use(num_codes)
        nonzeros += int(coding.nonzeros())
        positions += coding.latents[:, 0].numel()
    mean_squared_error = float(squared_error) / images.numel()
    return Evaluation(
        nmse=mean_squared_error / variance,
        psnr=-10 * math.log10(max(mean_squared_error, 1e-20)),
        perplexity=float(perplexity(use.double())),
        in_use=float((use > 0).double().mean()),
        nonzero=nonzeros / (positions * num_codes),
        use=use.cpu(),
    )

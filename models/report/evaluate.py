"""Metrics of a trained model on held-out images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..autoencoder import Autoencoder, perplexity

_BATCH_SIZE = 250


@dataclass(frozen=True)
class Evaluation:
    """Metrics over all held-out images."""

    nmse: float  # mean squared error divided by the variance of the training pixels
    psnr: float  # peak signal-to-noise ratio of the mean squared error, in decibels
    perplexity: float  # of the assignments, in [1, K]
    utilisation: float  # fraction of the codes or atoms that are active: assigned at least once
    nonzero: float  # fraction of all coefficients (positions x K) that are not zero
    counts: Tensor  # [K] int64, number of assignments of each code or atom


@torch.inference_mode()
def evaluate(model: Autoencoder, images: Tensor, variance: float, device: torch.device) -> Evaluation:
    """Evaluate on uint8 images [N, C, H, W], in float32; the error is summed in one order for any number of threads."""
    model.eval()
    num_codes = len(model.codes)
    counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
    squared_error = torch.zeros((), dtype=torch.float64, device=device)
    positions = nonzeros = 0
    for part in images.split(_BATCH_SIZE):
        batch = part.to(device).float() / 255
        coding = model.code(model.encode(batch))
        error = (model.decode(coding.latents) - batch).square()
        # One sum per image first: threads would partition the sum over a whole batch.
        squared_error += error.flatten(1).sum(1, dtype=torch.float64).sum()
        counts += coding.counts(num_codes)
        nonzeros += int(coding.nonzeros())
        positions += coding.latents[:, 0].numel()
    mean_squared_error = float(squared_error) / images.numel()
    return Evaluation(
        nmse=mean_squared_error / variance,
        psnr=-10 * math.log10(max(mean_squared_error, 1e-20)),
        perplexity=float(perplexity(counts.double())),
        utilisation=float((counts > 0).double().mean()),
        nonzero=nonzeros / (positions * num_codes),
        counts=counts.cpu(),
    )

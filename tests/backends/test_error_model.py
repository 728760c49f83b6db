"""Models of the arithmetic of matrix units, against the bounds that docs/numerics.md derives for it."""

from __future__ import annotations

import numpy as np
import pytest


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, to nearest even: float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def scale_of(values: np.ndarray) -> float:
    """The power of two that takes the largest magnitude to [2^14, 2^15)."""
    return 2.0 ** (14 - np.floor(np.log2(np.abs(values).max())))


def halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The high and low float16 terms of scaled values, in float64."""
    scaled = values * scale_of(values)
    high = scaled.astype(np.float16).astype(np.float64)
    return high, (scaled - high).astype(np.float16).astype(np.float64)


def cut(values: np.ndarray, quantum: np.ndarray) -> np.ndarray:
    return np.trunc(values / quantum) * quantum


def add_step(total: np.ndarray, a: np.ndarray, b: np.ndarray, extra_bits: int) -> np.ndarray:
    """total + a.b of one step of 16 features on a matrix unit: addends are aligned to the largest and cut."""
    addends = np.concatenate([total[..., None], a * b], axis=-1)
    _, exponent = np.frexp(np.abs(addends).max(-1, keepdims=True))
    summed = cut(addends, np.ldexp(1.0, exponent - 24 - extra_bits)).sum(-1)
    _, exponent = np.frexp(summed)
    return cut(summed, np.ldexp(1.0, exponent - 24))


def products(x: np.ndarray, codes: np.ndarray, extra_bits: int) -> np.ndarray:
    """high.high, low.high and high.low in one chain, as Triton's search adds them: [N, K]."""
    (x_high, x_low), (c_high, c_low) = halves(x), halves(codes)
    total = np.zeros((len(x), len(codes)))
    for a, b in (x_high, c_high), (x_low, c_high), (x_high, c_low):
        for d in range(0, x.shape[1], 16):
            total = add_step(total, a[:, None, d : d + 16], b[None, :, d : d + 16], extra_bits)
    return total


def samples(kind: str, num_features: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_features)
    codes = rng.standard_normal((24, num_features))
    x = rng.standard_normal((32, num_features))
    if kind == "near codes":
        x = codes[rng.integers(0, 24, 32)] + 0.05 * x
    elif kind == "clustered":
        x, codes = 1 + 0.01 * x, 1 + 0.01 * codes
    return x.astype(np.float32).astype(np.float64), codes.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("extra_bits", [1, 2])
@pytest.mark.parametrize("num_features", [16, 64, 256])
@pytest.mark.parametrize("kind", ["random", "near codes", "clustered"])
def test_triton_error_bound_of_modelled_products_holds(kind, num_features, extra_bits):
    x, codes = samples(kind, num_features)
    unit = scale_of(x) * scale_of(codes)
    error = products(x, codes, extra_bits) / unit - x @ codes.T
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(codes, axis=1).max()
    bound = 2 * 2.0**-19 * (1 + num_features / 85) * lengths
    assert np.abs(error).max() > 0
    assert (error.max(1) - error.min(1) <= bound).all()


def test_bfloat16_terms_miss_at_most_2_to_minus_17_and_omitted_product_2_to_minus_16():
    values = np.linspace(1, 2, 2**18, dtype=np.float32)
    high = bfloat16(values)
    low = bfloat16(values - high)
    missed = np.abs(values - high.astype(np.float64) - low) / values
    # Both bounds are nearly reached: half of either bound would be too small.
    assert 0.9 * 2.0**-17 < missed.max() <= 2.0**-17
    assert 0.9 * 2.0**-16 < (np.abs(low.astype(np.float64)) / values).max() ** 2 <= 2.0**-16

"""The reference's searches in float64 at every magnitude, against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlvae_kernels.backends import reference

from .fuzzing import SEEDS, fuzz_settings

# How much a float64 search may be off, times (|x| + |c|)^2.
TOLERANCE = Fraction(1, 2**46)


def numbers(data: st.DataObject, *shape: int) -> Tensor:
    """float64 with a common exponent down to 2^-1000 (1e-301) or up to 2^500, some with another one for each row."""
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    if data.draw(st.booleans()):
        values = torch.randint(-2, 3, shape, generator=generator).double()
    else:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
    exponent = torch.full((shape[0], 1), data.draw(st.sampled_from((-1000, -700, -530, -300, 0, 0, 300, 500))))
    if data.draw(st.booleans()):
        exponent += torch.randint(-40, 41, (shape[0], 1), generator=generator)
    # Twice, since a power of two beyond the range is not one.
    half = exponent.double() / 2
    return values * 2.0 ** half.floor() * 2.0 ** half.ceil()


def fractions(values: Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in values.tolist()]


def square_sum(row: list[Fraction]) -> Fraction:
    return sum((value * value for value in row), Fraction(0))


def assert_order(
    chosen: list[int], distances: list[Fraction], row: list[Fraction], codes: list[list[Fraction]], k: int
) -> None:
    """That `chosen` are the k nearest, in order, up to what float64 may be off; equal codes go by index."""
    assert len(set(chosen)) == k
    ordered = sorted(range(len(codes)), key=lambda code: distances[code])
    for place, code in enumerate(chosen):
        size = 2 * (square_sum(row) + max(square_sum(codes[code]), square_sum(codes[ordered[place]])))
        assert abs(distances[code] - distances[ordered[place]]) <= TOLERANCE * size
        lower = [other for other in range(code) if codes[other] == codes[code]]
        assert all(other in chosen[:place] for other in lower)


@fuzz_settings
@given(data=st.data())
def test_float64_nearest_code_and_topk_are_those_of_exact_arithmetic(data):
    n, count, d = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    codes = numbers(data, count, d)
    if data.draw(st.booleans()):
        codes = codes[torch.randint(0, count, (count,), generator=torch.Generator().manual_seed(data.draw(SEEDS)))]
    x = (
        numbers(data, n, d)
        if data.draw(st.booleans())
        else codes[torch.arange(n) % count] * data.draw(st.sampled_from((1.0, 1.0 + 2.0**-50, -1.0, 0.5)))
    )
    k = data.draw(st.integers(1, count))
    indices, distances = reference.nearest_code(x, codes, True, "float32")
    kept, values = reference.topk_codes(x, codes, k, "l2", None)
    assert torch.equal(kept[:, 0], indices)
    assert torch.equal(values[:, 0], distances)
    bias = numbers(data, count, 1)[:, 0] if data.draw(st.booleans()) else None
    products, _ = reference.topk_codes(x, codes, k, "dot", bias)
    exact_codes = fractions(codes)
    biases = [Fraction(0)] * count if bias is None else [Fraction(value) for value in bias.tolist()]
    for i, row in enumerate(fractions(x)):
        apart = [square_sum([a - b for a, b in zip(row, code, strict=True)]) for code in exact_codes]
        assert_order(kept[i].tolist(), apart, row, exact_codes, k)
        for value, code in zip(values[i].tolist(), kept[i].tolist(), strict=True):
            # A distance below the normal numbers of float64, or above all, is what float64 makes of it.
            if Fraction(2) ** -1020 < apart[code] < Fraction(2) ** 1023:
                assert abs(Fraction(value) - apart[code]) <= Fraction(1, 2**48) * apart[code] * d
        scores = [
            -sum((a * b for a, b in zip(row, code, strict=True)), Fraction(0)) - extra
            for code, extra in zip(exact_codes, biases, strict=True)
        ]
        # Equal codes with equal biases are ordered by index.
        kinds = [[*code, extra] for code, extra in zip(exact_codes, biases, strict=True)]
        # The bound is |x| |c| + |b|; the first term is compared by its square.
        squares = [square_sum(row) * square_sum(code) for code in exact_codes]
        bound = TOLERANCE * max(abs(extra) for extra in biases)
        ordered = sorted(scores)
        chosen = products[i].tolist()
        assert len(set(chosen)) == k
        for place, code in enumerate(chosen):
            excess = abs(scores[code] - ordered[place])
            assert excess <= bound or (excess - bound) ** 2 <= TOLERANCE**2 * max(squares)
            lower = [other for other in range(code) if kinds[other] == kinds[code]]
            assert all(other in chosen[:place] for other in lower)

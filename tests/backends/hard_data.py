"""Data on which fast scores with one common error bound cannot separate the codes: names, and how each is drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Case = tuple[Tensor, Tensor]  # x [N, D], codes [K, D]


def _diverged(x: Tensor, codes: Tensor) -> Case:
    codes = torch.nn.functional.normalize(codes)
    codes[len(codes) // 3] *= 1e12
    return x, codes


def _diverged_and_offset(x: Tensor, codes: Tensor) -> Case:
    codes += 1000
    codes[len(codes) // 2] *= 1e6
    return x + 1000, codes


def _two_lengths(x: Tensor, codes: Tensor) -> Case:
    codes = torch.nn.functional.normalize(codes)
    codes[::2] *= 1e4
    return x, codes


def _infinite(x: Tensor, codes: Tensor) -> Case:
    x[:, -1] = torch.inf
    return x, codes


# Each may change what it gets. `codes_1e-20` is beside rows of length 1.
CASES: dict[str, Callable[[Tensor, Tensor], Case]] = {
    "zero_codes": lambda x, codes: (x, torch.zeros_like(codes)),
    "equal_codes": lambda x, codes: (x, codes[:1].expand_as(codes).contiguous()),
    "eight_distinct_codes": lambda x, codes: (x, codes[torch.arange(len(codes)) % 8]),
    "half_zero_codes": lambda x, codes: (x, codes * (torch.arange(len(codes)) % 2)[:, None]),
    "negative_zeros": lambda x, codes: (x, codes.sign() * 0),
    "diverged_code": _diverged,
    "two_lengths": _two_lengths,
    "lognormal_lengths": lambda x, codes: (x, codes * (2 * torch.randn(len(codes), 1)).exp()),
    "common_offset": lambda x, codes: (x + 1000, codes + 1000),
    "common_offset_and_diverged_code": _diverged_and_offset,
    "collapsed_codes": lambda x, codes: (x, torch.randn(codes.shape[1]) + 1e-4 * codes),
    "codes_1e-20": lambda x, codes: (x, codes * 1e-20),
    "long_rows": lambda x, codes: (x * 1e6, codes),
    "rows_equal_codes": lambda x, codes: (codes[torch.arange(len(x)) % len(codes)].clone(), codes),
    "integers": lambda x, codes: (x.round(), codes.round()),
    "infinite_rows": _infinite,
    "subnormal_rows": lambda x, codes: (x * 1e-40, codes),
}


def draw(name: str, n: int, k: int, d: int) -> Case:
    return CASES[name](torch.randn(n, d), torch.randn(k, d))

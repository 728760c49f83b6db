"""The limits of the Triton `topk_codes`; this file does not import triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# The codes whose scores of one vector fit into registers, and the candidates of one vector that are sorted.
MAX_CODES_ON_CHIP, MAX_SELECTED = 512, 256


def unavailable_reason(x: Tensor | None = None, dictionary: Tensor | None = None, k: int = 1, *args: Any) -> str | None:
    """Why `topk_codes` is unavailable for so large a k, or None."""
    if dictionary is not None and k > MAX_SELECTED and len(dictionary) > MAX_CODES_ON_CHIP:
        return f"expected k of at most {MAX_SELECTED} for more than {MAX_CODES_ON_CHIP} codes, got {k}"
    return None

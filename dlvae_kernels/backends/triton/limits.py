"""What kernels cannot take, by operation; known without importing triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Of `topk_codes`: the scores of a row that registers hold, and the candidates of a row.
MOST_ON_CHIP, MOST_KEPT = 512, 256


def topk_codes(x: Tensor | None = None, dictionary: Tensor | None = None, k: int = 1, *args: Any) -> str | None:
    """Why it cannot keep so many."""
    if dictionary is not None and k > MOST_KEPT and len(dictionary) > MOST_ON_CHIP:
        return f"of more than {MOST_ON_CHIP} codes it keeps at most {MOST_KEPT}, and k is {k}"
    return None

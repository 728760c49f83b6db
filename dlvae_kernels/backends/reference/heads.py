"""How the codes of several heads are numbered, and the convention that the index -1 stands for no code."""

from __future__ import annotations

import torch
from torch import Tensor


def codes_of_heads(indices: Tensor, num_codes: int, num_heads: int) -> Tensor:
    """The codes of indices [..., H] among those of all heads, flat: code k of head h is h * K + k, and -1 stays -1."""
    first = torch.arange(num_heads, device=indices.device) * num_codes
    per_head = indices.reshape(-1, num_heads)
    return torch.where(per_head < 0, -1, per_head + first).flatten()

"""How evenly a codebook is used, and a warning when it collapses."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A codebook is looked at after each so many steps; it has collapsed if its perplexity is below this share of K.
_STEPS, _COLLAPSED = 100, 0.02


class CodebookUsage(NamedTuple):
    """The use of the codes of a codebook; reading a value from the device is left to the caller.

    perplexity: exp of the entropy of the moving averages of the counts, [] or [H], in [1, K].
    utilisation: share of codes whose average is at least a tenth of the mean, [] or [H].
    revived: number of codes that have been reinitialised since the module was made, [] int64.

    >>> CodebookUsage._fields
    ('perplexity', 'utilisation', 'revived')
    """

    perplexity: Tensor
    utilisation: Tensor
    revived: Tensor


def usage_of(cluster_size: Tensor, active_share: float, revived: Tensor) -> CodebookUsage:
    """The usage of codes with these counts [..., K]; a code is active with `active_share` of the mean count."""
    is_active = cluster_size >= active_share * cluster_size.mean(-1, keepdim=True)
    return CodebookUsage(perplexity_of(cluster_size), is_active.float().mean(-1), revived.clone())


def perplexity_of(counts: Tensor) -> Tensor:
    """exp of the entropy of the frequencies of the codes [..., K]; 1 for an empty batch."""
    frequency = counts.float() / counts.sum(-1, keepdim=True).clamp(min=1e-10)
    return torch.exp(-(frequency * torch.log(frequency + 1e-10)).sum(-1))


class CollapseWarning:
    """Warns once when a codebook that is trained collapses; the host does not wait for the device.

    Args:
        remedy: the arguments that the warning advises to pass.
    """

    def __init__(self, remedy: str) -> None:
        self._remedy = remedy
        self._steps = 0
        self._is_done = False
        self._perplexity: Tensor | None = None
        self._is_copied: torch.cuda.Event | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module, or one that is loaded, waits for no device."""
        return {
            "_remedy": self._remedy,
            "_steps": self._steps,
            "_is_done": self._is_done,
            "_perplexity": None,
            "_is_copied": None,
        }

    def after_step(self, cluster_size: Tensor) -> None:
        """Look at the counts [..., K] of a codebook every 100 training steps; compiled steps are not counted."""
        if self._is_done or torch.compiler.is_compiling():
            return
        self._steps += 1
        if self._steps % _STEPS == 1 and self._perplexity is not None:
            self._warn(cluster_size.shape[-1])
        if self._steps % _STEPS == 0:
            self._perplexity = perplexity_of(cluster_size).min().to("cpu", non_blocking=True)
            if cluster_size.is_cuda:
                self._is_copied = torch.cuda.Event()
                self._is_copied.record()

    def _warn(self, num_codes: int) -> None:
        """Warn if the perplexity of the step before, once it has arrived, shows a collapse."""
        if self._is_copied is not None and not self._is_copied.query():
            return
        perplexity = float(self._perplexity)  # type: ignore[arg-type]
        if perplexity < max(1.5, _COLLAPSED * num_codes) and num_codes >= 8:
            self._is_done = True
            warnings.warn(
                f"a codebook of {num_codes} codes has collapsed: the perplexity of its use is {perplexity:.1f}; pass"
                f" {self._remedy}, and check the scale of its inputs",
                stacklevel=2,
            )

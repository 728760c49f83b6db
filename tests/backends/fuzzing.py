"""The number of examples of the hypothesis tests: a fixed set, or DLVAE_FUZZ=<number> new random examples."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)
_EXAMPLES = int(os.environ.get("DLVAE_FUZZ", "0"))

fuzz_settings = settings(
    derandomize=not _EXAMPLES,
    database=None,
    deadline=None,
    max_examples=_EXAMPLES or 40,
    suppress_health_check=list(HealthCheck),
)

"""Faster methods for the quantizers of a loaded model, bound on the instances that are recognised."""

from .patch import patch
from .patched import Patched

__all__ = ["Patched", "patch"]

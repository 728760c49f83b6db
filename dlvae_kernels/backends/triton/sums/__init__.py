"""Sums of vectors by code, behind `ema_update` and the gradients of codebooks and dictionaries."""

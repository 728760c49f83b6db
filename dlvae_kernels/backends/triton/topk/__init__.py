"""The k nearest codes, behind `topk_codes`."""

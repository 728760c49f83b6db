"""The search for the nearest code, behind `nearest_code` and `vector_quantize`."""

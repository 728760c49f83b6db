"""Device functions that the kernels of all families share, and the named tuples that they take."""

"""`sparse_decode` with few atoms, on the matrix units."""

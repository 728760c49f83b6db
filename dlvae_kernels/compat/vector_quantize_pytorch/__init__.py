"""The quantizers of vector-quantize-pytorch 1.32 under its names, on the operations of dlvae_kernels."""

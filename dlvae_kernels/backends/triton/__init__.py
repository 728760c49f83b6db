"""The Triton backend, the first choice for CUDA tensors.

`operations` holds one function an operation and loads the file that implements it on first use. The files of operations
stand beside it; each folder holds the helpers of one family of kernels, and `language` those of all.
"""

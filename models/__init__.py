"""Autoencoders with the layers of dlvae_kernels, their training and their report.

The package runs from the checkout and is not installed.
"""

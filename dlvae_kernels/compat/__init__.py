"""Quantizers under the names, arguments and checkpoints of other libraries."""

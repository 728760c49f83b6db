"""Sums over exponentials of logits, behind `kept_softmax`."""

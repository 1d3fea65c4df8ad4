"""Sampling and the decode loop: from logits to tokens."""

"""Pruning of width, heads and depth."""

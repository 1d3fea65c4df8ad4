"""Attention per backend: `dispatch` chooses."""

"""Rows times the matrix of their group, per backend: `dispatch` chooses."""

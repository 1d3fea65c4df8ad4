"""Transformations of model directories: carve, and what it stands on."""

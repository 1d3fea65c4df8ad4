"""Transformations of model directories: carve, and what it stands on."""

import nemoe_jax  # noqa: F401  former module names (nemoe_jax/moved.py)

"""Rows of data sets: where they come from, which form they have, and their token ids and loss mask."""

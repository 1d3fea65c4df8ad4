"""A whole run: phases, checkpoints, metrics, reports."""

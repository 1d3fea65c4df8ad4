"""One training step: what learns, the loss, the optimizer, the FLOPs."""

"""Does a training step fit a TPU slice? Compiled ahead of time, and read."""

"""Dense language models taken apart into sparse Mixtures-of-Experts, repaired and run, in JAX and Flax NNX."""

from nemoe_jax import moved

moved.install()

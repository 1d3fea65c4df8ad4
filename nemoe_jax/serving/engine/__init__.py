"""Continuous batching: requests, slots, pages of the KV cache, the scheduler and the model runner."""

"""The Flax transformer: layers, attention, KV cache, dense and MoE FFNs, expert parallelism."""

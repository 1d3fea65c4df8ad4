"""Kernels per backend: attention, grouped matmuls, the fused MoE FFN, decode GEMV; none knows of the model."""

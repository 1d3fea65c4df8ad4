"""MoE models with more or fewer experts, and their routers."""

"""The dense SwiGLU feed-forward block; also an MoE layer's shared expert."""

import jax

from nemoe_jax.model.layers import NO_ADAPTERS, Adapters, SpecModule


class SwiGLU(SpecModule):
    def __call__(self, x_BTD: jax.Array, adapters: Adapters = NO_ADAPTERS) -> jax.Array:
        """down(silu(gate(x)) · up(x)), (B, T, D) -> (B, T, D) (Shazeer, 2020)."""
        gate, up = self.project("gate", x_BTD, adapters), self.project("up", x_BTD, adapters)
        return self.project("down", jax.nn.silu(gate) * up, adapters)

"""Log-probabilities of given tokens: what every next-token loss is made of.

V vocabulary; the axes before it are any.
"""

import jax
import jax.numpy as jnp


def token_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log p(target) by logits (…, V), of targets (…); float32, in nats.

    In float32 whatever the logits are: bfloat16 would round a loss of 3 to steps of 1/64.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

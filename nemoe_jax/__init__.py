"""Dense language models carved into sparse Mixtures-of-Experts, repaired and run, in JAX and Flax NNX.

    config, params = nemoe_jax.load_pretrained("models/nemo")
    logits_BTV = nemoe_jax.forward(config, params, tokens_BT).logits

The names below are imported when they are first used: importing the package loads neither JAX nor anything else.
"""

from typing import TYPE_CHECKING

from nemoe_jax import moved
from nemoe_jax.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from nemoe_jax.checkpoints.pretrained import load_pretrained, save_pretrained
    from nemoe_jax.errors import UserError
    from nemoe_jax.inference.generate import generate
    from nemoe_jax.inference.sampling import SamplingParams
    from nemoe_jax.model.transformer import forward
    from nemoe_jax.serving.engine.engine import Engine
    from nemoe_jax.serving.engine.request import Request
    from nemoe_jax.spec.config import ModelConfig
    from nemoe_jax.spec.mesh import make_mesh, parse_mesh
    from nemoe_jax.text.tokenizers.load import load_tokenizer

moved.install()
__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

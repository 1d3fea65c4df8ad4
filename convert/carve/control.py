"""The static control of a carve: no experts, the neurons that are most active whatever the token.

A router pays only where its choice of k·F/E neurons for each token does better than one choice for all tokens. The
control makes that one choice by the mean squared output of each neuron on the calibration text, and refits `down` by
the same ridge regression on the same text, layer after layer as a carve does. Its result is a dense model.

F neurons of the source, S neurons of the result, D embed.
"""

import jax.numpy as jnp
import numpy as np

from convert.carve.calibration import LayerText, activity, normal_equations, reconstruction_error, ridge_solve
from convert.streaming import Figures, Tensors
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import declare


def control_config(dense: ModelConfig, neurons: int) -> ModelConfig:
    """The shape of the result."""
    return dense.replace(ffn=neurons)


def control_layer(
    fitted: LayerText,
    held_out: LayerText,
    config: ModelConfig,
    layer: int,
    dense: Tensors,
    neurons: int,
    ridge: float,
    refit: bool,
) -> tuple[Tensors, Figures]:
    """The layer's tensors by checkpoint keys, and figures.

    Args:
        config: the source's.
        dense: gate, up (F, D) and down (D, F) on disk.
        ridge: how strongly `down` holds to the dense one; of the mean diagonal.
        refit: whether `down` is refitted at all.
    """
    size_F = np.asarray(activity(fitted))
    chosen_S = np.sort(np.argsort(-size_F, kind="stable")[:neurons])
    small_fitted, small_held_out = (text.restricted(chosen_S) for text in (fitted, held_out))
    down_SD = small_fitted.ffn["down"]
    if refit:
        down_SD = ridge_solve(*normal_equations(small_fitted), ridge, down_SD)
    specs = declare(config)["blocks"]["dense"]["ffn"]
    tensors = {
        specs["gate"].key_of(layer): dense["gate"][chosen_S],
        specs["up"].key_of(layer): dense["up"][chosen_S],
        specs["down"].key_of(layer): np.asarray(down_SD.T).astype(dense["down"].dtype),
    }
    return tensors, {
        "activity_share": float(size_F[chosen_S].sum() / size_F.sum()),
        "reconstruction_error": reconstruction_error(held_out, small_held_out, jnp.asarray(down_SD)),
    }

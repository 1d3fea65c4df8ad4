"""The static control of a carve: no experts, the neurons that are most active whatever the token.

A router pays only where its choice of k·F/E neurons for each token does better than one choice for all tokens. The
control makes that one choice by the mean squared output of each neuron on the calibration text, and refits them as a
carve does, layer after layer on the same text: by ridge regression and, if asked for, by gradient. Its result is a
dense model.

F neurons of the source, S neurons of the result, D embed.
"""

import dataclasses

import jax
import numpy as np

from convert.carve.calibration import LayerText, activity, normal_equations, reconstruction_error, ridge_solve
from convert.carve.gradient_refit import refit_by_gradient
from convert.options import CarveOptions
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
    options: CarveOptions,
    key: jax.Array,
) -> tuple[Tensors, Figures]:
    """The layer's tensors by checkpoint keys, and figures.

    Args:
        config: the source's.
        dense: gate, up (F, D) and down (D, F) on disk.
        ridge: how strongly `down` holds to the dense one; of the mean diagonal.
        options: what of the carve's refit is done.
        key: of the tokens drawn for the gradient steps.
    """
    size_F = np.asarray(activity(fitted))
    chosen_S = np.sort(np.argsort(-size_F, kind="stable")[:neurons])
    small_fitted = fitted.restricted(chosen_S)
    ffn = dict(small_fitted.ffn)
    if options.refit:
        ffn["down"] = ridge_solve(*normal_equations(small_fitted, weighted=True), ridge, ffn["down"])
    if options.refit_steps:
        everything = [np.zeros(weight_BT.shape, np.int32) for weight_BT in fitted.weights]
        one_group = {name: array[None] for name, array in ffn.items()}
        refitted = refit_by_gradient(fitted, everything, one_group, options.refit_steps, key)
        ffn = {name: array[0] for name, array in refitted.items()}
    specs = declare(config)["blocks"]["dense"]["ffn"]
    tensors = {spec.key_of(layer): np.asarray(ffn[name].T).astype(dense[name].dtype) for name, spec in specs.items()}
    return tensors, {
        "activity_share": float(size_F[chosen_S].sum() / size_F.sum()),
        "reconstruction_error": reconstruction_error(held_out, dataclasses.replace(held_out, ffn=ffn)),
    }

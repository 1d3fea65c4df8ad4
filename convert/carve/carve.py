"""Carve: a dense model's FFN neurons are dealt out to experts, and a router is made that finds them.

Neuron i of a dense SwiGLU adds silu(g_i·x)(u_i·x) w_i. The sum over any partition of the neurons is the dense FFN, so
the experts are groups of neurons that fire together: balanced k-means of the gate rows. An expert's router row is its
mean gate row, made orthonormal over the experts (clustering.py, router_init.py).

The routing weights of the chosen k sum to 1 while a partition sums to the whole, so `down` wants a factor: k if the
chosen experts gave the whole output, E if all gave alike. Without data it is the power of two next to √(kE), which
keeps the output's variance where the experts' outputs are independent (a power of two, so that bfloat16 weights come
back exactly); with calibration text it is what least squares finds for each expert. Too small a factor costs more than
too large a one.

With calibration text and a top-k that divides the experts, neurons may be in several experts instead, which are chosen
in groups (token_clusters.py).

The result is a Mixtral directory. Gate and up rows are the dense model's bits; without a refit, so are down's columns
divided by the scale.

What experts have to beat is the static control (`--control`, control.py): a dense model of the k·F/E neurons that are
most active on the same text, with the same refit.

F neurons, E experts, D embed.
"""

import dataclasses
from pathlib import Path

import numpy as np

from convert.carve import explore, self_text
from convert.carve.calibration import CalibrationStreams
from convert.carve.layer import carve_layer
from convert.carve.shape import carved_config, with_refit_steps
from convert.layerwise import hash_of
from convert.manifest import Figures, Manifest
from convert.options import CarveOptions
from convert.streaming import ConversionSettings, Tensors, convert_layers
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.utils.output_path import refuse_existing

# measured on SmolLM2-135M-Instruct, 16 experts, top-4, on English and on Python's documentation (docs/convert/carve.md)
UNCALIBRATED = (
    "carved from the weights alone. On a real model of 135M parameters that cost 8.8 nats per token and left it worse "
    "than uniform guessing, where --calibration text cost 0.8. The model wants repair before it is of use (nemoe-train "
    "run, with distillation from the dense one); nemoe perplexity --reference measures what it has lost"
)


def carve(
    source: str | Path, destination: str | Path, options: CarveOptions, run: ConversionSettings = ConversionSettings()
) -> Manifest:
    """Carves a model directory into another; returns the manifest (see convert/manifest.py).

    Raises:
        UserError: not a dense model, experts that do not divide its FFN, bad options, existing destination.
    """
    if options.explore:
        refuse_existing(destination)
        if run.dry_run:
            raise UserError("--explore makes no model, hence has no --dry-run")
        return explore.explore(source, destination, options, options.explore_layers)
    checkpoint = Checkpoint(source)
    config = carved_config(checkpoint.config, options, str(source))
    options = with_refit_steps(options)
    refuse_existing(destination)  # before the calibration text is read
    text = None
    if options.calibration:
        text = CalibrationStreams(checkpoint, options.calibration, options.calibration_tokens, options.seed)

    def layer(number: int) -> tuple[Tensors, Figures]:
        if number < config.dense_layers:
            return {}, {}
        return carve_layer(checkpoint, config, number, options, None if text is None else text.enter(number))

    return convert_layers(
        checkpoint,
        destination,
        config,
        layer,
        {"command": "carve", **dataclasses.asdict(options)},
        run=run,
        finished=None if text is None else lambda number, tensors: text.leave(number, config, tensors),
        summary=None if text is None else text.figures,
        inputs=None if text is None else hash_of(text.batches),
        extra={self_text.FILE: text.sampled.lines} if text and text.sampled else None,
    )


def printed_figures(manifest: Manifest) -> Figures:
    if "points" in manifest.figures:
        return {"points": len(manifest.figures["points"]), "report": explore.REPORT, "plot": explore.PLOT}
    layers, result = manifest.layers, manifest.result
    figures: Figures = {"layers": len(layers)}
    if manifest.options["control"]:
        figures["ffn"] = result.ffn
    else:
        figures |= {name: getattr(result, name) for name in ("experts", "top_k", "expert_ffn")}
        scales = [scale for layer in layers for scale in layer.get("output_scale", ())]
        if scales:
            figures |= {
                "router_orthogonality_error": max(layer.get("router_orthogonality_error", 0.0) for layer in layers),
                "output_scale_min": min(scales),
                "output_scale_max": max(scales),
            }
    figures |= {name: value for name, value in manifest.figures.items() if name != "verdict"}
    loads = [layer["load_max_over_mean"] for layer in layers if "load_max_over_mean" in layer]
    if loads:
        figures["load_max_over_mean"] = float(np.mean(loads))
    return figures


def last_words(manifest: Manifest) -> str:
    """What the user should know of the result before it is used."""
    if "points" in manifest.figures:
        return explore.table(manifest.figures)
    if manifest.options["calibration"]:
        verdict = manifest.figures["verdict"]
        control = "" if manifest.options["control"] else "; compare with the same command and --control"
        return verdict and f"{verdict}{control}"
    return UNCALIBRATED

"""Carve: a dense model's FFN neurons are dealt out to experts, and a router is made that finds them.

Neuron i of a dense SwiGLU adds silu(g_i·x)(u_i·x) w_i. The sum over any partition of the neurons is the dense FFN, so
the experts are groups of neurons that fire together: balanced k-means of the gate rows. An expert's router row is its
mean gate row, made orthonormal over the experts (partition.py, router.py).

The routing weights of the chosen k sum to 1 while a partition sums to the whole, so `down` wants a factor: k if the
chosen experts gave the whole output, E if all gave alike. Without data it is the power of two next to √(kE), which
keeps the output's variance where the experts' outputs are independent (a power of two, so that bfloat16 weights come
back exactly); with calibration text it is what least squares finds for each expert. Too small a factor costs more than
too large a one: see `benchmarks/output_scale.py`.

The result is a Mixtral directory. Nothing is retrained: gate and up rows are the dense model's bits, and so are down's
columns divided by the scale.

F neurons, E experts, D embed.
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from convert import partition, router, svd
from convert.calibrate import DenseStream, least_squares_scale
from convert.options import Conversion, option
from convert.stream import Figures, Report, Run, Tensors, stream
from nemoe_jax.checkpoint import Checkpoint
from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.schema import ParamSpec, declare
from nemoe_jax.writer import refuse_existing


@dataclasses.dataclass(frozen=True)
class CarveOptions:
    """How a dense model is carved."""

    experts: int = option(16, "experts per layer; must divide the FFN's neurons")
    top_k: int = option(4, "experts chosen for each token")
    partition: Literal["gate-kmeans", "contiguous"] = option(
        "gate-kmeans", "neurons of an expert: balanced k-means of gate rows, or runs of neighbours (a baseline)"
    )
    router: Literal["gate-mean", "random"] = option(
        "gate-mean", "router rows: orthonormalised mean gate rows, or random orthonormal ones (a baseline)"
    )
    svd: Literal["exact", "randomized"] = option(
        "randomized",
        "how the gate rows' subspace is found: exact takes minutes for a layer of the 12B, randomized seconds",
    )
    rank: int = option(64, "dimensions of that subspace")
    logit_std: float = option(0.02, "standard deviation of the router logits; small keeps the chosen weights near 1/k")
    output_scale: float = option(0.0, "factor of every `down`; 0 takes the power of two next to √(top_k · experts)")
    calibration: tuple[str, ...] = option(
        (), "text files, directories or globs: fit each expert's output scale by least squares"
    )
    calibration_tokens: int = option(16384, "tokens of calibration text to use")
    seed: int = option(0, "seed of the k-means and of everything random")


def carve(source: str | Path, destination: str | Path, options: CarveOptions, run: Run = Run()) -> Report:
    """Carves a model directory into another; returns the manifest (see convert/stream.py).

    Raises:
        UserError: not a dense model, experts that do not divide its FFN, bad options, existing destination.
    """
    checkpoint = Checkpoint(source)
    config = carved_config(checkpoint.config, options, str(source))
    refuse_existing(destination)  # before the calibration text is read
    calibration = None
    if options.calibration:
        calibration = DenseStream(checkpoint, options.calibration, options.calibration_tokens)
    specs = declare(checkpoint.config)["blocks"]["dense"]
    experts = declare(config)["blocks"]["moe"]["ffn"]

    def layer(number: int) -> tuple[Tensors, Figures]:
        dense = {name: checkpoint.view(_key(spec, number)) for name, spec in specs["ffn"].items()}
        for name, tensor in dense.items():
            if not jnp.isfinite(jnp.asarray(tensor)).all():
                raise UserError(f"{source}: {_key(specs['ffn'][name], number)}: not finite")
        norm_D = jnp.asarray(checkpoint.view(_key(specs["ffn_norm"], number)), jnp.float32)
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        gate_FD = jnp.asarray(dense["gate"], jnp.float32)
        members_EF, router_ED = choose(gate_FD, norm_D, options, key)
        scale_E = jnp.full(options.experts, options.output_scale or data_free_scale(options))
        if calibration is not None:
            up_FD, down_DF = (jnp.asarray(dense[name], jnp.float32) for name in ("up", "down"))
            scale_E = least_squares_scale(
                calibration.ffn_inputs(number),
                gate_FD[members_EF].swapaxes(1, 2),
                up_FD[members_EF].swapaxes(1, 2),
                down_DF.T[members_EF],
                router_ED.T,
                options.top_k,
            )
        tensors = {_key(experts["router"], number): np.asarray(router_ED)}
        for expert, members in enumerate(np.asarray(members_EF)):
            tensors[_key(experts["gate"], number, expert)] = dense["gate"][members]
            tensors[_key(experts["up"], number, expert)] = dense["up"][members]
            scaled = dense["down"][:, members].astype(np.float32) * float(scale_E[expert])
            tensors[_key(experts["down"], number, expert)] = scaled.astype(dense["down"].dtype)
        return tensors, _figures(router_ED, scale_E)

    return stream(checkpoint, destination, config, layer, {"command": "carve", **dataclasses.asdict(options)}, run=run)


def carved_config(dense: ModelConfig, options: CarveOptions, source: str) -> ModelConfig:
    """The shape of the result.

    Raises:
        UserError: the source is no dense model, or the options do not fit it.
    """
    if dense.experts:
        raise UserError(f"{source}: has {dense.experts} experts already; carve wants a dense model")
    if options.experts < 1 or dense.ffn % options.experts:
        raise UserError(f"{source}: {dense.ffn} FFN neurons do not divide into --experts {options.experts}")
    if not 1 <= options.top_k <= options.experts:
        raise UserError(f"--top-k: wanted 1 to --experts {options.experts}, got {options.top_k}")
    if options.output_scale < 0:
        raise UserError(f"--output-scale: wanted a positive number, or 0 to choose it, got {options.output_scale}")
    if options.calibration and options.output_scale:
        raise UserError("--output-scale and --calibration both set the scale; give one of them")
    if options.calibration_tokens < 1:
        raise UserError(f"--calibration-tokens: wanted a positive number, got {options.calibration_tokens}")
    return dense.replace(
        family="mixtral", ffn=0, experts=options.experts, top_k=options.top_k, expert_ffn=dense.ffn // options.experts
    )


def data_free_scale(options: CarveOptions) -> float:
    """The power of two next to √(top_k · experts), the lower of two that are equally near."""
    return 2.0 ** math.ceil(math.log2(options.top_k * options.experts) / 2 - 0.5)


def choose(gate_FD: jax.Array, norm_D: jax.Array, options: CarveOptions, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each expert's neurons, (E, F/E) int32, and the router, (E, D) float32, from the weights alone."""
    neurons, hidden = gate_FD.shape
    svd_key, cluster_key, router_key = jax.random.split(key, 3)
    if options.partition == "contiguous":
        members_EF = partition.contiguous(neurons, options.experts)
    else:
        folded_FD = gate_FD * norm_D
        subspace_DR, _ = svd.right_subspace(folded_FD, min(options.rank, neurons, hidden), options.svd, svd_key)
        members_EF = partition.balanced_kmeans(
            partition.neuron_features(folded_FD, subspace_DR), options.experts, cluster_key
        )
    temperature = router.default_temperature(norm_D, options.logit_std)
    if options.router == "random":
        return members_EF, router.random_orthogonal_router(router_key, options.experts, hidden, temperature)
    return members_EF, router.polar_router(router.expert_directions(gate_FD, members_EF), temperature)


def _key(spec: ParamSpec, layer: int, expert: int = 0) -> str:
    return spec.key.format(layer=layer, expert=expert)


def _figures(router_ED: jax.Array, scale_E: jax.Array) -> Figures:
    gram_EE = np.asarray(router_ED @ router_ED.T)
    square = float(np.trace(gram_EE)) / len(gram_EE)
    return {
        "router_temperature": square**0.5,
        "router_orthogonality_error": float(np.abs(gram_EE / square - np.eye(len(gram_EE))).max()),
        "output_scale": [float(scale) for scale in scale_E],
    }


def _summary(manifest: Report) -> Figures:
    layers = manifest["layers"]
    scales = [scale for layer in layers for scale in layer["output_scale"]]
    return {
        "experts": manifest["options"]["experts"],
        "top_k": manifest["options"]["top_k"],
        "expert_ffn": manifest["result"]["expert_ffn"],
        "layers": len(layers),
        "router_orthogonality_error": max(layer["router_orthogonality_error"] for layer in layers),
        "output_scale_min": min(scales),
        "output_scale_max": max(scales),
    }


CARVE = Conversion(
    "carve",
    carve,
    CarveOptions,
    "deal a dense model's FFN neurons out to experts and make a router that finds them",
    "Any dense Mistral- or Llama-shaped directory becomes a Mixtral directory of that size; no data is needed.",
    _summary,
    source_help="dense model directory",
)

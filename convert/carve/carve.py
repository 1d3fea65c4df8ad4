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
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert.carve import clustering, router_init, self_text, svd
from convert.carve.calibration import (
    RIDGE_TOKENS,
    SHARED_GATE,
    CalibrationStreams,
    LayerText,
    activity,
    distilled_router,
    measure,
    normal_equations,
    output_scale,
    ridge_solve,
)
from convert.carve.control import control_config, control_layer
from convert.carve.token_clusters import carve_token_clusters, measure_groups
from convert.layerwise import hash_of
from convert.options import CarveOptions
from convert.streaming import ConversionSettings, Figures, Manifest, Tensors, convert_layers
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES, FamilyName
from nemoe_jax.spec.schema import declare
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
    checkpoint = Checkpoint(source)
    config = carved_config(checkpoint.config, options, str(source))
    if options.control:
        config = control_config(checkpoint.config, config.top_k * config.expert_ffn)
    refuse_existing(destination)  # before the calibration text is read
    text = None
    if options.calibration:
        text = CalibrationStreams(checkpoint, options.calibration, options.calibration_tokens, options.seed)

    def layer(number: int) -> tuple[Tensors, Figures]:
        if number < config.dense_layers:
            return {}, {}
        dense = _dense_ffn(checkpoint, number)
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        norm_D = jnp.asarray(
            checkpoint.finite(declare(checkpoint.config)["blocks"]["dense"]["ffn_norm"].key_of(number))
        )
        texts = None if text is None else text.enter(number)
        if options.control:
            assert texts is not None
            ridge = _ridge(options, config.ffn, texts[0])
            return control_layer(*texts, checkpoint.config, number, dense, config.ffn, ridge, options, key)
        if by_token_clusters(options):
            assert texts is not None
            return _token_clusters(*texts, config, number, options, key, dense["up"].dtype)
        shared_S = _most_active(dense, texts and texts[0], config.shared_ffn)
        members_EF, router_ED = cluster_and_route(jnp.asarray(dense["gate"]), norm_D, options, key, shared_S)
        label_F = jnp.full(len(dense["gate"]), options.experts).at[members_EF].set(jnp.arange(options.experts)[:, None])
        if texts is None:
            scale_G = np.full(options.experts + 1, options.output_scale or data_free_scale(options), np.float32)
            scale_G[-1] = 1 / SHARED_GATE
            down_DF, factor_F = dense["down"], scale_G[label_F]
            figures: Figures = {}
        else:
            router_ED, scale_G, down_DF, figures = _calibrated(*texts, label_F, router_ED, options)
            factor_F = np.ones(len(label_F), np.float32)
        figures = _figures(router_ED, scale_G[: options.experts]) | figures
        tensors = _assemble(config, number, dense | {"down": down_DF}, np.asarray(members_EF), shared_S, factor_F)
        router = declare(config)["blocks"]["moe"]["ffn"]["router"].key_of(number)
        return {router: np.asarray(router_ED), **tensors}, figures

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


def _dense_ffn(checkpoint: Checkpoint, layer: int) -> Tensors:
    """gate, up (F, D) and down (D, F) as they lie on disk.

    Raises:
        UserError: NaN or infinity among them, which would take the clustering and the fits with it.
    """
    specs = declare(checkpoint.config)["blocks"]["dense"]["ffn"]
    return {name: checkpoint.finite(spec.key_of(layer)) for name, spec in specs.items()}


def _most_active(dense: Tensors, text: LayerText | None, neurons: int) -> np.ndarray:
    """The neurons of the shared expert, ascending: those with the largest outputs, on text or by their weights."""
    if not neurons:
        return np.empty(0, np.int64)
    if text is None:
        up, down = (jnp.asarray(dense[name], jnp.float32) for name in ("up", "down"))
        size_F = clustering.neuron_weights(up, down.T)
    else:
        size_F = activity(text)
    return np.sort(np.argsort(-np.asarray(size_F), kind="stable")[:neurons])


def _calibrated(
    fitted: LayerText, held_out: LayerText, label_F: jax.Array, router_ED: jax.Array, options: CarveOptions
) -> tuple[jax.Array, np.ndarray, np.ndarray, Figures]:
    """Router (E, D), the output scale of each expert and of the shared one (E + 1,), `down` (D, F), and figures."""
    if options.router in ("auto", "distilled"):
        router_ED = distilled_router(fitted, label_F, options.experts, options.top_k, options.logit_std)
    gram_FF, moment_FD = normal_equations(fitted, label_F, router_ED, options.top_k)
    scale_G = output_scale(gram_FF, moment_FD, fitted.ffn["down"], label_F, options.experts + 1)
    down_FD = fitted.ffn["down"] * scale_G[label_F][:, None]
    if options.refit:
        down_FD = ridge_solve(gram_FF, moment_FD, _ridge(options, len(down_FD), fitted), down_FD)
    figures = measure(held_out, label_F, router_ED, down_FD, options.top_k)
    return router_ED, np.asarray(scale_G), np.asarray(down_FD.T), figures


def by_token_clusters(options: CarveOptions) -> bool:
    """Whether experts are chosen in groups (see token_clusters.py)."""
    if options.partition == "auto":
        return not _obstacle_to_token_clusters(options)
    return options.partition == "token-clusters"


def _obstacle_to_token_clusters(options: CarveOptions) -> str:
    """What token clusters want and the options do not give; "" if nothing."""
    shares = options.top_k < options.experts < 2 * options.top_k
    if options.experts == options.top_k or (options.experts % options.top_k and not shares):
        return (
            f"expected --experts to be a multiple of --top-k {options.top_k}, or less than twice it and more than it, "
            f"got {options.experts}"
        )
    if not (options.calibration and options.refit and options.router == "auto" and options.layout == "mixtral"):
        return "expected --calibration text, and neither --no-refit, --router nor --layout shared"
    return ""


def _token_clusters(
    fitted: LayerText,
    held_out: LayerText,
    config: ModelConfig,
    layer: int,
    options: CarveOptions,
    key: jax.Array,
    dtype: np.dtype,
) -> tuple[Tensors, Figures]:
    """The layer's tensors by checkpoint keys, and figures."""
    top_k, size = config.top_k, config.expert_ffn
    neurons = top_k * size
    shared = max(2 * top_k - config.experts, 0)  # experts that every token uses
    groups = carve_token_clusters(
        fitted,
        2 if shared else config.experts // top_k,
        neurons,
        _ridge(options, neurons, fitted),
        options.logit_std,
        key,
        options.refit_steps,
        shared * size,
    )
    specs = declare(config)["blocks"]["moe"]["ffn"]
    gate_CSD, up_CSD = (np.asarray(groups.ffn[name]).swapaxes(1, 2) for name in ("gate", "up"))
    rows = {"gate": gate_CSD, "up": up_CSD, "down": top_k * np.asarray(groups.ffn["down"])}
    own_ED = np.repeat(np.asarray(groups.router_CD), top_k - shared, axis=0)
    tensors = {specs["router"].key_of(layer): np.pad(own_ED, ((shared, 0), (0, 0)))}
    for name, rows_CSD in rows.items():
        own_FD = rows_CSD[:, shared * size :].reshape(-1, config.hidden)
        rows_ESD = np.concatenate([rows_CSD[0, : shared * size], own_FD]).reshape(config.experts, size, -1)
        for expert, rows_SD in enumerate(rows_ESD):
            tensors[specs[name].key_of(layer, expert)] = (rows_SD.T if name == "down" else rows_SD).astype(dtype)
    distinct = len(np.unique(groups.members_CS)) / len(fitted.ffn["down"])
    return tensors, {"neurons_kept": distinct, **measure_groups(held_out, groups)}


def _ridge(options: CarveOptions, neurons: int, text: LayerText) -> float:
    return options.refit_ridge or RIDGE_TOKENS * neurons / text.tokens


def _assemble(
    config: ModelConfig, layer: int, dense: Tensors, members_EF: np.ndarray, shared_S: np.ndarray, factor_F: np.ndarray
) -> Tensors:
    """The layer's experts by checkpoint keys, `down` times each neuron's factor."""
    ffn = declare(config)["blocks"]["moe"]["ffn"]
    tensors = {}
    groups = [(ffn, expert, members) for expert, members in enumerate(members_EF)]
    if len(shared_S):
        groups.append((ffn["shared"], 0, shared_S))
        tensors[ffn["shared_gate"].key_of(layer)] = np.zeros((1, config.hidden), np.float32)  # SHARED_GATE, always
    for specs, expert, members in groups:
        tensors[specs["gate"].key_of(layer, expert)] = dense["gate"][members]
        tensors[specs["up"].key_of(layer, expert)] = dense["up"][members]
        down_DF = dense["down"][:, members].astype(np.float32) * factor_F[members]
        tensors[specs["down"].key_of(layer, expert)] = down_DF.astype(dense["up"].dtype)
    return tensors


def carved_config(dense: ModelConfig, options: CarveOptions, source: str) -> ModelConfig:
    """The shape of the result.

    Raises:
        UserError: the source is no dense model, or the options do not fit it.
    """
    if dense.experts:
        raise UserError(f"{source}: has {dense.experts} experts already; carve wants a dense model")
    if options.layout == "mixtral" and (options.shared_ffn or options.keep_dense):
        raise UserError("--shared-ffn and --keep-dense: Mixtral's layout cannot express them; --layout shared can")
    shared = 0
    if options.layout == "shared":
        shared = options.shared_ffn or dense.ffn // max(options.experts, 1)
        if not 0 < shared < dense.ffn:
            raise UserError(
                f"--shared-ffn: expected 1 to {dense.ffn - 1} of {source}'s neurons, got {options.shared_ffn}"
            )
        if not 0 <= options.keep_dense < dense.layers:
            raise UserError(f"--keep-dense: expected 0 to {dense.layers - 1}, got {options.keep_dense}")
    if options.experts < 1 or (dense.ffn - shared) * options.overlap % options.experts:
        left = f"{dense.ffn - shared} of the {dense.ffn}" if shared else str(dense.ffn)
        raise UserError(f"{source}: {left} FFN neurons do not divide into --experts {options.experts}")
    if not 1 <= options.top_k <= options.experts:
        raise UserError(f"--top-k: expected 1 to --experts {options.experts}, got {options.top_k}")
    if options.top_k * options.overlap > options.experts:
        raise UserError(
            f"--top-k: expected at most {options.experts // options.overlap}, so that the chosen experts have no more "
            f"neurons than the dense FFN with --overlap {options.overlap}, got {options.top_k}"
        )
    if options.output_scale < 0:
        raise UserError(f"--output-scale: expected a positive number, or 0 to choose it, got {options.output_scale}")
    if options.calibration and options.output_scale:
        raise UserError("--output-scale and --calibration both set the scale; give one of them")
    for flag, needs_text in (("--router distilled", options.router == "distilled"), ("--control", options.control)):
        if needs_text and not options.calibration:
            raise UserError(f"{flag}: expected --calibration text")
    obstacle = _obstacle_to_token_clusters(options)
    for flag, given in {
        "--partition token-clusters": options.partition == "token-clusters",
        "--overlap": options.overlap != 1,
    }.items():
        if given and obstacle:
            raise UserError(f"{flag}: {obstacle}")
    if options.overlap < 1 or (options.overlap > 1 and not by_token_clusters(options)):
        raise UserError(f"--overlap: expected 1, or more with --partition token-clusters, got {options.overlap}")
    takes_steps = options.refit and (options.control or by_token_clusters(options))
    if options.refit_steps < 0 or (options.refit_steps and not takes_steps):
        raise UserError(
            "--refit-steps: expected 0, or more with a refit of --partition token-clusters or --control, "
            f"got {options.refit_steps}"
        )
    if options.control and options.layout != "mixtral":
        raise UserError("--control makes a dense model; --layout shared is about experts")
    if not options.refit_ridge >= 0:
        raise UserError(f"--refit-ridge: expected a positive number, or 0 to choose it, got {options.refit_ridge}")
    return dense.replace(
        family=_family(dense, bool(shared), source),
        ffn=dense.ffn if options.keep_dense else 0,
        dense_layers=options.keep_dense,
        experts=options.experts,
        top_k=options.top_k,
        expert_ffn=(dense.ffn - shared) * options.overlap // options.experts,
        shared_ffn=shared,
    )


def _family(dense: ModelConfig, shared: bool, source: str | Path) -> FamilyName:
    """The MoE family that expresses what the dense model has."""
    record = FAMILIES[dense.family]
    name = record.carved_shared if shared else record.carved
    if name is None:
        raise UserError(
            f"{source}: no MoE family without a shared expert expresses a {dense.family} model; "
            f"--layout shared writes {record.carved_shared}"
        )
    return name


def data_free_scale(options: CarveOptions) -> float:
    """The power of two next to √(top_k · experts), the lower of two that are equally near."""
    return 2.0 ** math.ceil(math.log2(options.top_k * options.experts) / 2 - 0.5)


def cluster_and_route(
    gate_FD: jax.Array, norm_D: jax.Array, options: CarveOptions, key: jax.Array, shared_S: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Each expert's neurons, (E, (F - S)/E) int32, and the router, (E, D) float32, from the weights alone.

    Args:
        shared_S: neurons that no expert gets.
    """
    if not len(shared_S):
        return _choose_among(gate_FD.astype(jnp.float32), norm_D, options, key)
    rest_F = np.setdiff1d(np.arange(len(gate_FD)), shared_S)
    members_EF, router_ED = _choose_among(gate_FD[rest_F].astype(jnp.float32), norm_D, options, key)
    return jnp.asarray(rest_F)[members_EF], router_ED


def _choose_among(
    gate_FD: jax.Array, norm_D: jax.Array, options: CarveOptions, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    neurons, hidden = gate_FD.shape
    svd_key, cluster_key, router_key = jax.random.split(key, 3)
    if options.partition == "contiguous":
        members_EF = clustering.contiguous(neurons, options.experts)
    else:
        folded_FD = gate_FD * norm_D
        subspace_DR, _ = svd.right_subspace(folded_FD, min(options.rank, neurons, hidden), options.svd, svd_key)
        members_EF = clustering.balanced_kmeans(
            clustering.neuron_features(folded_FD, subspace_DR), options.experts, cluster_key
        )
    temperature = router_init.default_temperature(norm_D, options.logit_std)
    if options.router == "random":
        return members_EF, router_init.random_orthogonal_router(router_key, options.experts, hidden, temperature)
    return members_EF, router_init.polar_router(router_init.expert_directions(gate_FD, members_EF), temperature)


def _figures(router_ED: jax.Array, scale_E: np.ndarray) -> Figures:
    gram_EE = np.asarray(router_ED @ router_ED.T)
    square = max(float(np.trace(gram_EE)) / len(gram_EE), float(np.finfo(np.float32).tiny))
    return {
        "router_temperature": square**0.5,
        "router_orthogonality_error": float(np.abs(gram_EE / square - np.eye(len(gram_EE))).max()),
        "output_scale": [float(scale) for scale in scale_E],
    }


def printed_figures(manifest: Manifest) -> Figures:
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
    if manifest.options["calibration"]:
        verdict = manifest.figures["verdict"]
        control = "" if manifest.options["control"] else "; compare with the same command and --control"
        return verdict and f"{verdict}{control}"
    return UNCALIBRATED

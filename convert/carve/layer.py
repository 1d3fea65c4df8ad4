"""One layer of a carve: its neurons to experts, its router, its fits.

F neurons, E experts, D embed, G groups of neurons with an output scale of their own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from convert.carve import clustering, router_init, svd
from convert.carve.calibration import (
    RIDGE_TOKENS,
    SHARED_GATE,
    LayerText,
    activity,
    distilled_router,
    measure,
    normal_equations,
    output_scale,
    ridge_solve,
)
from convert.carve.control import control_layer
from convert.carve.shape import by_token_clusters, fits_gate
from convert.carve.token_clusters import carve_token_clusters, measure_groups
from convert.options import CarveOptions
from convert.streaming import Figures, Tensors
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import declare


def carve_layer(
    checkpoint: Checkpoint,
    config: ModelConfig,
    number: int,
    options: CarveOptions,
    texts: tuple[LayerText, LayerText] | None,
) -> tuple[Tensors, Figures]:
    """A layer's FFN by checkpoint keys, and figures.

    Args:
        checkpoint: the dense model.
        config: the result's.
        texts: what the layer's FFN reads and should give, to fit on and held out; None for a carve from the weights.
    """
    dense = _dense_ffn(checkpoint, number)
    key = jax.random.fold_in(jax.random.key(options.seed), number)
    norm_D = jnp.asarray(checkpoint.finite(declare(checkpoint.config)["blocks"]["dense"]["ffn_norm"].key_of(number)))
    if options.control:
        assert texts is not None
        ridge = _ridge(options, config.ffn, texts[0])
        return control_layer(*texts, checkpoint.config, number, dense, config.ffn, ridge, options, key)
    if by_token_clusters(options):
        assert texts is not None
        return _token_clusters(*texts, config, number, options, key, dense["up"].dtype)
    shared_S = _most_active(dense, texts and texts[0], config.shared_ffn)
    members_EF, router_ED = cluster_and_route(jnp.asarray(dense["gate"]), norm_D, options, key, shared_S)
    labels = np.full(len(dense["gate"]), options.experts, np.int32)
    labels[np.asarray(members_EF)] = np.arange(options.experts)[:, None]
    label_F = jax.device_put(labels)
    if texts is None:
        scale_G = np.full(options.experts + 1, options.output_scale or data_free_scale(options), np.float32)
        scale_G[-1] = 1 / SHARED_GATE
        down_DF, factor_F = dense["down"], scale_G[labels]
        figures: Figures = {}
    else:
        router_ED, scale_G, down_DF, figures = _calibrated(*texts, label_F, router_ED, options)
        factor_F = np.ones(len(label_F), np.float32)
    figures = _figures(router_ED, scale_G[: options.experts]) | figures
    tensors = _assemble(config, number, dense | {"down": down_DF}, np.asarray(members_EF), shared_S, factor_F)
    router = declare(config)["blocks"]["moe"]["ffn"]["router"].key_of(number)
    return {router: np.asarray(router_ED), **tensors}, figures


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
    top_k, size, gated = config.top_k, config.expert_ffn, config.shared_ffn
    neurons = gated + top_k * size
    always = max(2 * top_k - config.experts, 0)  # experts that every token uses
    groups = carve_token_clusters(
        fitted,
        2 if always else config.experts // top_k,
        neurons,
        _ridge(options, neurons, fitted),
        options.logit_std,
        key,
        options.refit_steps,
        gated + always * size,
        gated,
        fits_gate(config, options),
    )
    specs = declare(config)["blocks"]["moe"]["ffn"]
    gate_CSD, up_CSD = (np.asarray(groups.ffn[name]).swapaxes(1, 2) for name in ("gate", "up"))
    rows = {"gate": gate_CSD, "up": up_CSD, "down": np.asarray(groups.ffn["down"])}
    own_ED = np.repeat(np.asarray(groups.router_CD), top_k - always, axis=0)
    tensors = {specs["router"].key_of(layer): np.pad(own_ED, ((always, 0), (0, 0)))}
    if gated:
        gate_D = np.zeros(config.hidden, np.float32) if groups.gate_D is None else groups.gate_D
        tensors[specs["shared_gate"].key_of(layer)] = np.asarray(gate_D)[None]
    for name, rows_CSD in rows.items():
        own_FD = rows_CSD[:, groups.shared :].reshape(-1, config.hidden)
        routed = np.concatenate([rows_CSD[0, gated : groups.shared], own_FD]).reshape(config.experts, size, -1)
        parts = {specs[name].key_of(layer, expert): (rows_SD, float(top_k)) for expert, rows_SD in enumerate(routed)}
        if gated:
            parts[specs["shared"][name].key_of(layer, 0)] = rows_CSD[0, :gated], 1 / SHARED_GATE
        for tensor, (rows_SD, factor) in parts.items():
            tensors[tensor] = (factor * rows_SD.T if name == "down" else rows_SD).astype(dtype)
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

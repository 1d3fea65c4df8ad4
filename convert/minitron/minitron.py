"""Minitron pruning: the channels, neurons, heads and layers that calibration text needs least are cut away.

One pass of the model over the text, layer by layer, scores everything; the rest is sort and slice:

1. Neurons. Each layer, and each expert, keeps those that the text excites most (importance.py).
2. Channels. One set for the whole model, since every layer adds to the same stream.
3. Norms. Over fewer channels an RMSNorm divides by another mean square. Each norm's weight is multiplied by
   √(mean square of the kept channels / mean square of all), measured on the text; epsilon, of which a config has but
   one (NekoMind's heads use it too), by the mean of those factors' squares. Where the dropped channels are always
   zero this is exact.

4. Heads. As many go for each key/value head; where every head has keys of its own, they go with it.
5. Layers, by how far they turn the stream or by the loss without them; all scores are of the whole model.

The result opens like any other model; the published recipe then distils its source into it.
(Muralidharan et al., 2024, arXiv 2407.14679; Sreenivas et al., 2024, arXiv 2408.11796; the third step is not theirs.)

D embed, F neurons, E experts, K kv heads, G heads of each.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from convert.layerwise import calibration_batches, fitted_batches, kind_of
from convert.minitron.importance import Scorer, Scores
from convert.minitron.kept import NEURON_AXES, Kept, PrunedCheckpoint
from convert.minitron.search import candidate_shapes, compared
from convert.options import MinitronOptions
from convert.streaming import ConversionSettings, Figures, Manifest, Tensors, convert_layers
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import count, declare
from nemoe_jax.utils.output_path import refuse_existing


def minitron(
    source: str | Path,
    destination: str | Path,
    options: MinitronOptions,
    run: ConversionSettings = ConversionSettings(),
) -> Manifest:
    """Prunes a model directory into a smaller one; returns the manifest (see convert/manifest.py).

    Raises:
        UserError: sizes that the model cannot be pruned to, no calibration text, existing destination.
    """
    checkpoint = Checkpoint(source)
    shapes = pruned_configs(checkpoint.config, options, str(source))
    if not options.calibration:
        raise UserError("minitron: wants --calibration text, on which activations are measured")
    refuse_existing(destination)  # before the calibration text is read
    if jax.process_count() > 1:
        raise UserError("minitron: its layers are scored one after another; run it in a single process")
    batches = calibration_batches(checkpoint, options.calibration, options.calibration_tokens)
    fitted = len(batches) if options.target is None else fitted_batches(batches)
    shallower = any(shape.layers < checkpoint.config.layers for shape in shapes)
    fewer_heads = any(shape.heads < checkpoint.config.heads for shape in shapes)
    by_loss = shallower and options.depth_importance == "loss"
    scorer = Scorer(checkpoint, batches[:fitted], fewer_heads, by_loss)
    scores = scorer.blank() if run.dry_run else scorer.all_layers()
    candidates = [PrunedCheckpoint(checkpoint, *choose(scores, checkpoint.config, shape, options)) for shape in shapes]
    table = None if options.target is None or run.dry_run else compared(candidates, batches[fitted:])
    best = 0 if table is None else min(range(len(table)), key=lambda number: table[number]["held_out_loss"])
    config, kept = candidates[best].config, candidates[best].kept

    def layer(number: int) -> tuple[Tensors, Figures]:
        if run.dry_run:  # the time that a layer takes is that of its scores
            scorer.layer(number)
        return {}, _figures(scores, kept, checkpoint.config, kept.layers[number] if kept.layers else number)

    return convert_layers(
        checkpoint,
        destination,
        config,
        layer,
        {"command": "minitron", **dataclasses.asdict(options), "kept_sha256": kept.digest()},
        run=run,
        copy=lambda ref: kept.cut(from_source := kept.source_ref(ref), checkpoint.view(from_source.key)),
        summary=lambda: _summary(scores, kept, table),
    )


def _summary(scores: Scores, kept: Kept, table: list[Figures] | None) -> Figures:
    figures: Figures = {} if kept.hidden_D is None else {"hidden_kept": _share(scores.hidden_D, kept.hidden_D)}
    figures |= {} if kept.layers is None else {"kept_layers": kept.layers, "layer_scores": scores.layers_L.tolist()}
    return figures | ({} if table is None else {"candidates": table})


def pruned_configs(config: ModelConfig, options: MinitronOptions, source: str) -> list[ModelConfig]:
    """The shape after pruning, or those of a search."""
    if options.target is None:
        return [pruned_config(config, options, source)]
    if any(size is not None for size in _wanted(options).values()):
        raise UserError(f"{source}: --target: expected without {', '.join(_wanted(options))}")
    return candidate_shapes(config, options.target, source)


def _wanted(options: MinitronOptions) -> dict[str, int | None]:
    names = ("hidden", "ffn", "shared_ffn", "dense_ffn", "heads", "layers")
    return {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}


def pruned_config(config: ModelConfig, options: MinitronOptions, source: str) -> ModelConfig:
    """The shape after pruning; its epsilon and its dense layers are still the source's.

    Raises:
        UserError: nothing to prune, 0 or more than there is, or a flag for what the model does not have.
    """
    fields = {"--hidden": "hidden", "--ffn": "expert_ffn" if config.experts else "ffn"}
    fields |= {"--shared-ffn": "shared_ffn"} if config.shared_ffn else {}
    fields |= {"--dense-ffn": "ffn"} if config.dense_layers else {}
    fields |= {"--heads": "heads", "--layers": "layers"}
    changes: dict[str, int] = {}
    for flag, size in _wanted(options).items():
        if size is None:
            continue
        if flag not in fields:
            raise UserError(f"{source}: {flag}: the model has none; it can be pruned by {', '.join(fields)}")
        present = getattr(config, fields[flag])
        if not 1 <= size <= present:
            raise UserError(f"{source}: {flag}: expected 1 to the source's {present}, got {size}")
        changes[fields[flag]] = size
    if not changes:
        raise UserError(f"{source}: nothing to prune; give {' or '.join(fields)} or --target")
    heads = changes.get("heads", config.heads)
    if config.heads == config.kv_heads:
        changes["kv_heads"] = heads
    elif heads % config.kv_heads:
        raise UserError(f"{source}: --heads: expected a multiple of {config.kv_heads} key/value heads, got {heads}")
    if config.dense_layers:
        changes["dense_layers"] = min(config.dense_layers, changes.get("layers", config.layers) - 1)
    return config.replace(**changes)


def choose(
    scores: Scores, config: ModelConfig, pruned: ModelConfig, options: MinitronOptions
) -> tuple[ModelConfig, Kept]:
    """What is kept: the best-scored of everything, as many as the pruned shape has, and the norms' factors.

    Returns:
        The shape, with the epsilon and the dense layers that go with that.
    """
    random = np.random.default_rng(options.seed)

    def best(score: np.ndarray, size: int) -> np.ndarray:
        if options.importance == "random":
            score = random.random(score.shape)
        return np.sort(np.argsort(-score, axis=-1, kind="stable")[..., :size], axis=-1)

    hidden_D, factors = None, {}
    if pruned.hidden < config.hidden:
        hidden_D = best(scores.hidden_D, pruned.hidden)
        if options.rescale_norms:
            wider = config.hidden / pruned.hidden
            factors = {key: float(np.sqrt(share_D[hidden_D].sum() * wider)) for key, share_D in scores.shares_D.items()}

    def of_axis(axis: str, score: np.ndarray) -> np.ndarray:
        if axis != "heads" or config.heads == config.kv_heads:
            return best(score, getattr(pruned, axis))
        group = config.heads // config.kv_heads
        kept_KG = best(score.reshape(-1, group), pruned.heads // config.kv_heads)
        return (kept_KG + group * np.arange(config.kv_heads)[:, None]).ravel()

    neurons = [
        {axis: of_axis(axis, score) for axis, score in layer.items() if getattr(pruned, axis) < getattr(config, axis)}
        for layer in scores.neurons
    ]
    layers = None
    if pruned.layers < config.layers:
        layers = best(scores.layers_L, pruned.layers).tolist()
        if layers[-1] < config.dense_layers:
            raise UserError(f"--layers: expected more than {pruned.layers}, of which none would be an MoE layer")
        pruned = pruned.replace(dense_layers=sum(layer < config.dense_layers for layer in layers))
    if factors:
        pruned = pruned.replace(norm_eps=config.norm_eps * float(np.mean(np.square(list(factors.values())))))
    return pruned, Kept(hidden_D, neurons, factors, config, layers)


def _share(scores: np.ndarray, kept: np.ndarray) -> float | list[float]:
    """The share of the squared scores that stays; of each expert, where there are several."""
    square = scores**2
    whole = np.maximum(square.sum(-1), np.finfo(np.float64).tiny)
    return (np.take_along_axis(square, kept, axis=-1).sum(-1) / whole).tolist()


def _figures(scores: Scores, kept: Kept, config: ModelConfig, layer: int) -> Figures:
    block = declare(config)["blocks"][kind_of(config, layer)]
    keys = {name: block[name].key_of(layer) for name in ("attn_norm", "ffn_norm")}
    figures: Figures = {f"{name}_factor": kept.factors[key] for name, key in keys.items() if key in kept.factors}
    return figures | {
        f"{axis}_kept": _share(scores.neurons[layer][axis], indices) for axis, indices in kept.neurons[layer].items()
    }


def printed_figures(manifest: Manifest) -> Figures:
    result, layers = manifest.result, manifest.layers
    total, active = count(result)
    figures: Figures = {"parameters": total, "active_parameters": active}
    names = ("layers", "heads", "hidden", *NEURON_AXES, "norm_eps")
    figures |= {name: value for name in names if (value := getattr(result, name))}
    figures |= {name: value for name, value in manifest.figures.items() if name in ("hidden_kept", "kept_layers")}
    for axis in NEURON_AXES:
        if values := [layer[f"{axis}_kept"] for layer in layers if f"{axis}_kept" in layer]:
            figures[f"{axis}_kept_min"] = float(np.min(values))
    factors = [value for layer in layers for name, value in layer.items() if name.endswith("_factor")]
    if factors:
        figures |= {"norm_factor_min": min(factors), "norm_factor_max": max(factors)}
    return figures

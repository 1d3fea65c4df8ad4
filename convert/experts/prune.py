"""Prune: every MoE layer keeps its most useful experts; the others are dropped with their router rows.

Nothing else changes, and nothing has to be rescaled: a softmax over the chosen logits is normalized anew by itself, and
so is one over all experts. The pruned model is the source with the dropped experts' logits at −∞.

Which experts are useful shows on calibration text, in one pass of the unpruned model with one layer in memory:

reap        An expert's score is the mean, over the tokens that are routed to it, of routing weight × ‖output‖: what the
            layer's output loses with it (Lasby et al., REAP the Experts, 2025, arXiv 2510.13999). An expert that no
            token chose scores 0.
frequency   The score is the share of all choices that went to the expert; the usual baseline.
exhaustive  The subset whose layer output is nearest to the unpruned one's, in squares (Lu et al., Not All Experts are
            Equal, 2024, arXiv 2402.14800). With token t's Gram matrix of the experts' outputs, G_t = [⟨f_e, f_e'⟩], and
            the change d_t of its routing weights, that is Σ_t d_tᵀ G_t d_t: experts run once, whatever the number of
            subsets. Every other choice is measured in the same way, for the record.

Experts that share a router row, as a carve by token clusters makes them, are chosen together: they stay or go as a
group, whose score is the sum of theirs.

With --merge the others are not dropped but merged into those that stay (see merge.py).

B batch, T tokens (or sequence), D embed, F expert_ffn, E experts, S subsets.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.experts.merge import groups_of, merged, similarities
from convert.experts.outputs import (
    Groups,
    einsum,
    expert_products,
    groups_of_experts,
    moe_layers,
    routing,
    routing_within,
)
from convert.layerwise import LayerwiseModel, calibration_batches
from convert.options import PruneOptions
from convert.streaming import ConversionSettings, Figures, Hashes, Manifest, Tensors, convert_layers
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import declare
from nemoe_jax.utils.json_file import read_json
from nemoe_jax.utils.output_path import refuse_existing
from nemoe_jax.utils.progress import progress_bar

ERROR_TOKENS = 2048  # evenly spaced ones on which subsets are compared
MOST_SUBSETS = 200_000
SUBSETS_AT_ONCE = 128


def prune(
    source: str | Path, destination: str | Path, options: PruneOptions, run: ConversionSettings = ConversionSettings()
) -> Manifest:
    """Prunes an MoE model's directory into another; returns the manifest (see convert/manifest.py).

    A run that goes on after an interruption finds its choices again from the same text.

    Raises:
        UserError: not an MoE model, bad options, no text, existing destination.
    """
    checkpoint = Checkpoint(source)
    config = pruned_config(checkpoint.config, options, str(source))
    groups = groups_of_experts(checkpoint)
    specs = declare(config)["blocks"]["moe"]["ffn"]
    for number, of_layer in groups.items():
        refuse_misfits(of_layer, options, f"{source}: {specs['router'].key_of(number)}")
    refuse_existing(destination)  # before the text is read
    if options.choices:
        choices = earlier_choices(Path(options.choices), groups, config.experts)
        refuse_other_source(Path(options.choices), checkpoint)
    else:
        batches = calibration_batches(checkpoint, options.calibration, options.calibration_tokens)
        if run.dry_run:  # any experts do for the plan
            choices = {number: {"kept": list(range(config.experts))} for number in moe_layers(config)}
        else:
            choices = choose_experts(checkpoint, batches, config.experts, options.method, options.merge)

    def layer(number: int) -> tuple[Tensors, Figures]:
        if number not in choices:
            return {}, {}
        kept = choices[number]["kept"]
        router = specs["router"].key_of(number)
        tensors = {router: checkpoint.view(router)[kept]}
        for new, group in enumerate(choices[number].get("groups") or [[expert] for expert in kept]):
            experts = [
                {name: checkpoint.view(specs[name].key_of(number, old)) for name in ("gate", "up", "down")}
                for old in group
            ]
            one = experts[0]
            if len(group) > 1:
                one = merged(experts, [choices[number]["scores"][expert] for expert in group])
            tensors |= {specs[name].key_of(number, new): array for name, array in one.items()}
        return tensors, choices[number]

    return convert_layers(
        checkpoint,
        destination,
        config,
        layer,
        {"command": "prune-experts", **dataclasses.asdict(options)},
        run=run,
        inputs={"choices_sha256": hashlib.sha256(json.dumps(choices).encode()).hexdigest()},
    )


def pruned_config(old: ModelConfig, options: PruneOptions, source: str) -> ModelConfig:
    """The shape of the result.

    Raises:
        UserError: the source is not an MoE model, or the options do not fit it.
    """
    if not old.experts:
        raise UserError(f"{source}: a dense model; prune-experts wants an MoE model")
    if bool(options.choices) == bool(options.calibration):
        raise UserError("prune-experts: expected either --calibration text or --choices of an earlier run")
    if not old.top_k <= options.experts < old.experts:
        raise UserError(
            f"--experts: expected {old.top_k} (top-k) to {old.experts - 1} of the {old.experts} experts of {source}, "
            f"got {options.experts}"
        )
    if options.merge and (options.choices or options.method != "reap"):
        raise UserError("--merge: expected --calibration and --method reap with it")
    return old.replace(experts=options.experts)


def refuse_misfits(groups: Groups, options: PruneOptions, router: str) -> None:
    """Refuses what a layer's groups of experts do not allow.

    Raises:
        UserError: an option would break groups up, or there are too many subsets.
    """
    size = len(groups[0])
    tied = f"{router}: groups of {size} experts share a row and are chosen together"
    if options.experts % size:
        raise UserError(f"{tied}; --experts: expected a multiple of {size}, got {options.experts}")
    if options.merge and size > 1:
        raise UserError(f"{tied}; --merge: expected experts that are chosen one by one")
    subsets = math.comb(len(groups), options.experts // size)
    if options.method == "exhaustive" and subsets > MOST_SUBSETS:
        raise UserError(
            f"--method exhaustive: {len(groups) * size} experts have {subsets:,} subsets of {options.experts}, more "
            f"than {MOST_SUBSETS:,}; use --method reap"
        )


def earlier_choices(manifest: Path, groups: dict[int, Groups], experts: int) -> dict[int, Figures]:
    """What `choose_experts` returns, from the manifest of an earlier run.

    Where that run kept as many experts, in whole groups, the same ones (whatever its method was), else those of the
    highest scores.

    Raises:
        UserError: no such file, or no scores for the experts of these layers in it.
    """
    rows = {row.get("layer"): row for row in read_json(manifest).get("layers", []) if isinstance(row, dict)}
    choices = {}
    for layer, of_layer in groups.items():
        count = 1 + max(itertools.chain(*of_layer))
        row = rows.get(layer, {})
        scores = row.get("scores")
        if not isinstance(scores, list) or not all(isinstance(score, (int, float)) for score in scores):
            raise UserError(f"{manifest}: expected the scores of layer {layer}'s experts, got {scores!r:.60}")
        if len(scores) != count:
            raise UserError(f"{manifest}: layer {layer}: expected {count} scores, got {len(scores)}")
        whole = [group for group in of_layer if all(expert in (row.get("kept") or ()) for expert in group)]
        kept = sorted({*itertools.chain(*whole)})
        if len(kept) != experts:
            kept = of_highest_scores(np.array(scores), of_layer, experts)
        choices[layer] = {"kept": kept, "scores": scores}
    return choices


def of_highest_scores(scores_E: np.ndarray, groups: Groups, experts: int) -> list[int]:
    """As many experts, in order: those of the groups with the highest sums of scores."""
    score_G = np.array([scores_E[group].sum() for group in groups])
    best = np.argsort(-score_G, kind="stable")[: experts // len(groups[0])]
    return sorted(itertools.chain(*(groups[number] for number in best)))


def refuse_other_source(manifest: Path, source: Checkpoint) -> None:
    """Choices are of one model's weights.

    Raises:
        UserError: the manifest says that the earlier run was on other weights.
    """
    recorded = read_json(manifest).get("source", {}).get("sha256")
    if not recorded:
        return
    with Hashes(source) as hashes:
        found = hashes.result()
    other = [name for name in {**recorded, **found} if recorded.get(name) != found.get(name)]
    if found and other:  # in a job of several processes the first one looks
        raise UserError(
            f"{manifest}: expected the choices of an earlier run on {source.directory}, got those of a run on other "
            f"weights ({other[0]} differs)"
        )


def choose_experts(
    source: Checkpoint, batches: Sequence[np.ndarray], experts: int, method: str = "reap", merge: bool = False
) -> dict[int, Figures]:
    """{MoE layer: which experts it keeps, in order, all experts' scores, the dropped ones' share of them, the error}.

    Args:
        batches: tokens (B, T + 1), int32, as `calibration_batches` gives.
        merge: also say of each kept expert with which others it is merged, as `groups`.
    """
    layers = LayerwiseModel(source)
    config, groups = source.config, groups_of_experts(source)
    streams = [layers.embed(tokens_BS[:, :-1]) for tokens_BS in batches]
    choices = {}
    with progress_bar() as bar:
        for layer in bar.track(range(config.layers), description="scoring experts"):
            weights = layers.weights(layer)
            text = []
            for number, x_BTD in enumerate(streams):
                middle_BTD, normed_BTD = layers.attend(layer, weights, x_BTD)
                streams[number] = middle_BTD + layers.feed_forward(layer, weights, normed_BTD)
                if "router" in weights["ffn"]:
                    text.append(expert_products(weights["ffn"], normed_BTD))
                # one program at a time: on several CPU devices, programs that communicate starve one another
                jax.block_until_ready((streams[number], text[-1:]))
            if text:
                choices[layer] = _choose(config, text, experts, method, merge, groups[layer])
    return choices


def _choose(
    config: ModelConfig,
    text: Sequence[tuple[jax.Array, jax.Array]],
    experts: int,
    method: str,
    merge: bool,
    groups: Groups,
) -> dict[str, Any]:
    """A layer's figures from the (logits, Gram matrices) of each batch."""
    sums = [use_of_experts(config, logits_TE, gram_TEE) for logits_TE, gram_TEE in text]
    output_E, chosen_E = (np.sum([np.asarray(part) for part in parts], axis=0) for parts in zip(*sums, strict=True))
    score_E = chosen_E / chosen_E.sum() if method == "frequency" else output_E / np.maximum(chosen_E, 1)
    per_batch = -(-ERROR_TOKENS // len(text))
    logits_TE, gram_TEE = (
        jnp.concatenate([_spaced(part, per_batch) for part in parts]) for parts in zip(*text, strict=True)
    )
    if method == "exhaustive":
        subsets = itertools.combinations(groups, experts // len(groups[0]))
        subsets_SC = np.sort(np.array(list(subsets)).reshape(-1, experts))
    else:
        subsets_SC = np.array([of_highest_scores(score_E, groups, experts)])
    error_S = subset_errors(config, logits_TE, gram_TEE, subsets_SC)
    best = int(np.argmin(error_S))
    kept = subsets_SC[best].tolist()
    merges = {}
    if merge:
        merges["groups"] = groups_of(kept, score_E, similarities(np.asarray(logits_TE), np.asarray(gram_TEE)))
    return merges | {
        "kept": kept,
        "scores": score_E.tolist(),
        "dropped_share": float(1 - score_E[kept].sum() / max(score_E.sum(), np.finfo(np.float32).tiny)),
        "layer_error": float(error_S[best]),
    }


def _spaced(array: jax.Array, rows: int) -> np.ndarray:
    """At most `rows` evenly spaced rows."""
    return np.asarray(array)[np.linspace(0, len(array) - 1, min(rows, len(array))).astype(int)]


@functools.partial(jax.jit, static_argnums=0)
def use_of_experts(config: ModelConfig, logits_TE: jax.Array, gram_TEE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens, (E,) each: routing weight × ‖output‖, and how often each expert was chosen."""
    weights_TE, chosen_TE = routing(config, logits_TE)
    norm_TE = jnp.sqrt(jnp.diagonal(gram_TEE, axis1=1, axis2=2))
    return jnp.sum(weights_TE * norm_TE, axis=0), jnp.sum(chosen_TE, axis=0)


def subset_errors(config: ModelConfig, logits_TE: jax.Array, gram_TEE: jax.Array, subsets_SC: np.ndarray) -> np.ndarray:
    """Squared error (S,) of the experts' summed output where only a subset is left, relative to that of all of them.

    Args:
        subsets_SC: the experts of each subset.
    """
    member_SE = np.zeros((len(subsets_SC), config.experts), bool)
    np.put_along_axis(member_SE, subsets_SC, True, axis=1)
    return np.asarray(_subset_errors(config, logits_TE, gram_TEE, member_SE))


@functools.partial(jax.jit, static_argnums=0)
def _subset_errors(config, logits_TE, gram_TEE, member_SE):
    whole_TE, _ = routing(config, logits_TE)

    def squared(weights_TES):
        return jnp.sum(einsum("TEG,TGS->TES", gram_TEE, weights_TES) * weights_TES, axis=(0, 1))

    def errors(member_SE):
        weights_TES, _ = routing_within(config, logits_TE, member_SE.T)
        return squared(weights_TES - whole_TE[..., None])

    subsets = len(member_SE)
    size = min(subsets, SUBSETS_AT_ONCE)
    chunks = -(-subsets // size)
    padded_SE = jnp.pad(member_SE, ((0, chunks * size - subsets), (0, 0)), constant_values=True)
    error_S = jax.lax.map(errors, padded_SE.reshape(chunks, size, -1)).reshape(-1)[:subsets]
    return error_S / squared(whole_TE[..., None])


def printed_figures(manifest: Manifest) -> Figures:
    layers = [figures for figures in manifest.layers if "kept" in figures]

    def mean(name: str) -> float:
        return float(np.mean([figures[name] for figures in layers]))

    return {
        "experts": manifest.result.experts,
        "top_k": manifest.result.top_k,
        "moe_layers": len(layers),
        **{f"{name}_mean": mean(name) for name in ("dropped_share", "layer_error") if name in layers[0]},
    }

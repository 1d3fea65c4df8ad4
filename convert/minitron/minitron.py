"""Minitron width pruning: the residual channels and FFN neurons that calibration text excites least are cut away.

One pass of the model over the text, layer by layer, scores everything; the rest is sort and slice:

1. Neurons. Each layer, and each expert, keeps those that the text excites most (importance.py).
2. Channels. One set for the whole model, since every layer adds to the same stream.
3. Norms. Over fewer channels an RMSNorm divides by another mean square. Each norm's weight is multiplied by
   √(mean square of the kept channels / mean square of all), measured on the text; epsilon, of which a config has but
   one (NekoMind's heads use it too), by the mean of those factors' squares. Where the dropped channels are always
   zero this is exact.

Heads stay as they are. The result opens like any other model; the published recipe then distils its source into it.
(Muralidharan et al., 2024, arXiv 2407.14679; Sreenivas et al., 2024, arXiv 2408.11796; the third step is not theirs.)

D embed, F neurons, E experts.
"""

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np

from convert.layerwise import calibration_batches, kind_of
from convert.minitron.importance import Scorer, Scores
from convert.options import MinitronOptions
from convert.streaming import ConversionSettings, Figures, Manifest, Tensors, convert_layers
from nemoe_jax.checkpoints.reader import Checkpoint, TensorRef
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import count, declare
from nemoe_jax.utils.output_path import refuse_existing

NEURON_AXES = ("ffn", "expert_ffn", "shared_ffn")  # as ModelConfig and the schema call them


@dataclasses.dataclass
class Kept:
    """Ascending indices of what stays, and the factors of the norms."""

    hidden_D: np.ndarray | None  # None: all
    neurons: list[dict[str, np.ndarray]]  # of each layer, axes that are pruned: {axis: (F,), or (E, F) of experts}
    factors: dict[str, float]  # {checkpoint key of a norm: what multiplies its weight}

    def cut(self, ref: TensorRef, tensor: np.ndarray) -> np.ndarray:
        """A tensor of the source, in its checkpoint's layout, without what is dropped."""
        spec = ref.spec
        inner = spec.axes[len(spec.stacked) :]
        dimensions = (spec.produced, spec.contracted) if spec.transposed else tuple((axis,) for axis in inner)
        for number, axes in enumerate(dimensions):
            kept = self._along(axes, ref)
            if kept is not None:
                tensor = np.take(tensor, kept, axis=number)
        return tensor.astype(np.float32) * self.factors[ref.key] if ref.key in self.factors else tensor

    def _along(self, axes: tuple[str, ...], ref: TensorRef) -> np.ndarray | None:
        if axes in (("embed",), ("norm",)):
            return self.hidden_D
        if len(axes) > 1 or axes[0] not in NEURON_AXES:
            return None
        kept = self.neurons[ref.spec.first_layer + ref.place[0]].get(axes[0])
        return kept[ref.place[1]] if kept is not None and "experts" in ref.spec.stacked else kept

    def digest(self) -> str:
        """Hexadecimal; an interrupted job goes on only where the text gives the same again."""
        indices = [self.hidden_D, *(kept for layer in self.neurons for kept in layer.values())]
        content = [None if kept is None else kept.tolist() for kept in indices], self.factors
        return hashlib.sha256(repr(content).encode()).hexdigest()


def minitron(
    source: str | Path,
    destination: str | Path,
    options: MinitronOptions,
    run: ConversionSettings = ConversionSettings(),
) -> Manifest:
    """Prunes a model directory into a narrower one; returns the manifest (see convert/manifest.py).

    Raises:
        UserError: sizes that the model cannot be pruned to, no calibration text, existing destination.
    """
    checkpoint = Checkpoint(source)
    config = pruned_config(checkpoint.config, options, str(source))
    if not options.calibration:
        raise UserError("minitron: wants --calibration text, on which activations are measured")
    refuse_existing(destination)  # before the calibration text is read
    if jax.process_count() > 1:
        raise UserError("minitron: its layers are scored one after another; run it in a single process")
    scorer = Scorer(checkpoint, calibration_batches(checkpoint, options.calibration, options.calibration_tokens))
    scores = scorer.blank() if run.dry_run else scorer.all_layers()
    kept = choose(scores, checkpoint.config, config, options)
    if kept.factors:
        config = config.replace(norm_eps=config.norm_eps * float(np.mean(np.square(list(kept.factors.values())))))

    def layer(number: int) -> tuple[Tensors, Figures]:
        if run.dry_run:  # the time that a layer takes is that of its scores
            scorer.layer(number)
        return {}, _figures(scores, kept, checkpoint.config, number)

    return convert_layers(
        checkpoint,
        destination,
        config,
        layer,
        {"command": "minitron", **dataclasses.asdict(options), "kept_sha256": kept.digest()},
        run=run,
        copy=lambda ref: kept.cut(ref, checkpoint.view(ref.key)),
        summary=lambda: {} if kept.hidden_D is None else {"hidden_kept": _share(scores.hidden_D, kept.hidden_D)},
    )


def pruned_config(config: ModelConfig, options: MinitronOptions, source: str) -> ModelConfig:
    """The shape after pruning; its epsilon is still the source's.

    Raises:
        UserError: nothing to prune, 0 or more than there is, or a flag for what the model does not have.
    """
    fields = {"--hidden": "hidden", "--ffn": "expert_ffn" if config.experts else "ffn"}
    fields |= {"--shared-ffn": "shared_ffn"} if config.shared_ffn else {}
    fields |= {"--dense-ffn": "ffn"} if config.dense_layers else {}
    wanted = {
        "--hidden": options.hidden,
        "--ffn": options.ffn,
        "--shared-ffn": options.shared_ffn,
        "--dense-ffn": options.dense_ffn,
    }
    changes = {}
    for flag, size in wanted.items():
        if size is None:
            continue
        if flag not in fields:
            raise UserError(f"{source}: {flag}: the model has none; it can be pruned by {', '.join(fields)}")
        present = getattr(config, fields[flag])
        if not 1 <= size <= present:
            raise UserError(f"{source}: {flag}: expected 1 to the source's {present}, got {size}")
        changes[fields[flag]] = size
    if not changes:
        raise UserError(f"{source}: nothing to prune; give {' or '.join(fields)}")
    return config.replace(**changes)


def choose(scores: Scores, config: ModelConfig, pruned: ModelConfig, options: MinitronOptions) -> Kept:
    """The best-scored channels and neurons, as many as the pruned shape has, and the norms' factors."""
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
    neurons = [
        {
            axis: best(score, getattr(pruned, axis))
            for axis, score in layer.items()
            if getattr(pruned, axis) < getattr(config, axis)
        }
        for layer in scores.neurons
    ]
    return Kept(hidden_D, neurons, factors)


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
    figures |= {name: value for name in ("hidden", *NEURON_AXES, "norm_eps") if (value := getattr(result, name))}
    figures |= manifest.figures
    for axis in NEURON_AXES:
        if values := [layer[f"{axis}_kept"] for layer in layers if f"{axis}_kept" in layer]:
            figures[f"{axis}_kept_min"] = float(np.min(values))
    factors = [value for layer in layers for name, value in layer.items() if name.endswith("_factor")]
    if factors:
        figures |= {"norm_factor_min": min(factors), "norm_factor_max": max(factors)}
    return figures

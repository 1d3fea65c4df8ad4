"""Upcycle: an MoE model of E experts becomes one of m·E, in one pass over its files and without data.

Expert j·E + e of the result descends from expert e; a result may be upcycled again. There are three ways:

wide    Every expert and its router row m times, k' = m·k. Copies tie, so all copies of the source's k are chosen and
        share their weights: the same output, for m times the FLOPs. Noise on `down`, which sums to zero over the
        copies, lets them learn different things.
split   Every expert's neurons cut into m parts, `down` times m, rows m times, k' = m·k: the same output, FLOPs and
        parameters, from smaller experts. Exact where m is a power of two; other factors round `down`.
copies  Every expert m times, k' = k: the same FLOPs, m times the experts' parameters. Group j, the j-th copies of all
        experts, has a shift s_j·x in its logits. It is common to the group and cancels in the softmax, and where one
        group leads the others by more than the chosen experts' logits are apart, the source's k are chosen, in that
        group. Groups see disjoint tokens, so copies learn different things from the first step.

`copies` is exact for most tokens only. Logits are linear in x, so between the regions of two groups there is a strip of
tokens that choose from both. With a shift of r spreads (the distance of the chosen experts' logits) a share of about
0.4 / r of all tokens is in there, while rounding the shifted logits to float32 moves them by about 2e-8·r spreads,
which swaps experts that nearly tie: r around 1000 is best, and a share near 1e-3 of (token, layer) pairs chooses
otherwise.
A row in half precision loses its own part on the channels that carry a shift, so that those carry it where the rows
differ least, and engines that compute logits in half precision (transformers does for such weights) want r around 16.
In `wide` and `split` nothing of this arises.

Sources: Komatsuzaki et al., Sparse Upcycling, 2022 (arXiv 2212.05055); He et al., Upcycling Large Language Models into
Mixture of Experts, 2024 (arXiv 2410.07524), where parts of an expert form virtual groups; Nakamura et al.,
Drop-Upcycling, 2025 (arXiv 2502.19261), on copies that learn alike.

E experts, D embed, F expert_ffn, G groups (m), C channels with a shift.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.options import CHECK_TOKENS, UpcycleOptions
from convert.streaming import ConversionSettings, Figures, Manifest, Tensors, convert_layers
from convert.verify.routing import compare, windows
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import declare
from nemoe_jax.utils.output_path import refuse_existing

SHIFT = {"float32": 1024.0, "bfloat16": 16.0, "float16": 16.0}  # spreads, by the dtype on disk
LEAST_NORM = 0.25  # of the median norm weight: fainter channels are not trusted to carry a shift
SATURATED = 8.0  # nats that a group leads by when a softmax over all experts has all but forgotten the others


def upcycle(
    source: str | Path, destination: str | Path, options: UpcycleOptions, run: ConversionSettings = ConversionSettings()
) -> Manifest:
    """Upcycles a model directory into another; returns the manifest (see convert/manifest.py).

    With `check` or `check_tokens` its figures' "check" holds what `compare.compare` finds.

    Raises:
        UserError: not an MoE model, experts that are no multiple, bad options, existing destination.
    """
    checkpoint = Checkpoint(source)
    config = upcycled_config(checkpoint.config, options, str(source))
    refuse_existing(destination)  # before the text is read
    tokens = options.check_tokens or (CHECK_TOKENS if options.check else 0)
    batches = windows(checkpoint, options.check, tokens, options.seed)
    old, groups = checkpoint.config, options.experts // checkpoint.config.experts
    block = declare(old)["blocks"]["moe"]

    def layer(number: int) -> tuple[Tensors, Figures]:
        if number < old.dense_layers:
            return {}, {}
        specs = block["ffn"]
        router_ED = np.asarray(checkpoint.view(specs["router"].key_of(number)), np.float32)
        figures: Figures = {}
        if options.mode == "copies":
            norm_D = np.asarray(checkpoint.view(block["ffn_norm"].key_of(number)), np.float32)
            router_ED, figures = shifted_rows(router_ED, norm_D, groups, old, options.shift or SHIFT[old.dtype])
        else:
            router_ED = np.tile(router_ED, (groups, 1))
        tensors = {specs["router"].key_of(number): router_ED}
        for expert in range(old.experts):
            gate, up, down = (checkpoint.view(specs[name].key_of(number, expert)) for name in ("gate", "up", "down"))
            if options.mode == "split":
                parts = split_expert(gate, up, down, groups)
            elif options.mode == "wide":
                generator = np.random.default_rng((options.seed, number, expert))
                parts = [(gate, up, noisy) for noisy in with_noise(down, groups, options.noise, generator)]
            else:
                parts = [(gate, up, down)] * groups
            for group, part in enumerate(parts):
                for name, tensor in zip(("gate", "up", "down"), part, strict=True):
                    tensors[specs[name].key_of(number, group * old.experts + expert)] = tensor
        return tensors, figures

    recorded = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in ("check", "check_tokens")
    }
    manifest = convert_layers(checkpoint, destination, config, layer, {"command": "upcycle", **recorded}, run=run)
    if batches and not run.dry_run:
        check = dataclasses.asdict(compare(checkpoint, Checkpoint(destination), batches))
        manifest = dataclasses.replace(manifest, figures={"check": check})
    return manifest


def upcycled_config(old: ModelConfig, options: UpcycleOptions, source: str) -> ModelConfig:
    """The shape of the result.

    Raises:
        UserError: the source is not an MoE model, or the options do not fit it.
    """
    if not old.experts:
        raise UserError(f"{source}: a dense model; upcycle wants an MoE model (carve makes one)")
    groups = options.experts // old.experts
    if options.experts % old.experts or groups < 2:
        raise UserError(
            f"--experts: expected 2, 3, … times the {old.experts} experts of {source}, got {options.experts}"
        )
    if options.mode == "split" and old.expert_ffn % groups:
        raise UserError(f"{source}: experts of {old.expert_ffn} neurons do not divide into {groups} parts")
    for name in ("shift", "noise", "check_tokens"):
        if not getattr(options, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')}: expected 0 or more, got {getattr(options, name)}")
    if options.mode == "copies":
        return old.replace(experts=options.experts)
    parts = groups if options.mode == "split" else 1
    return old.replace(experts=options.experts, top_k=old.top_k * groups, expert_ffn=old.expert_ffn // parts)


def shifted_rows(
    router_ED: np.ndarray, norm_D: np.ndarray, groups: int, config: ModelConfig, shift: float
) -> tuple[np.ndarray, Figures]:
    """Router rows of all groups, (G·E, D) float32, and which channels carry the shift, and how strongly.

    The size of logit differences is known without data where the router's input has unit variance before its norm
    weight: it is the distance of the rows, each times the norm weight. The spread is that between an expert and its
    k - 1 nearest, whatever is further away: rows that were shifted before are. Groups that share a row have none: any
    lead does, and a small one is rounded least.
    """
    folded_ED = router_ED * norm_D
    distance_EE = np.linalg.norm(folded_ED[:, None] - folded_ED, axis=-1)
    spread = np.sort(distance_EE, axis=1)[:, min(max(config.top_k - 1, 1), config.experts - 1)].max()
    spread = spread or distance_EE.max() / shift
    if not config.normalize_top_k:
        spread = max(spread, SATURATED)
    codes_GC = group_codes(groups)
    faint_D = np.abs(norm_D) < LEAST_NORM * np.median(np.abs(norm_D))
    channels_C = np.argsort(np.where(faint_D, np.inf, folded_ED.std(0)), kind="stable")[: codes_GC.shape[1]]
    if len(channels_C) < codes_GC.shape[1] or faint_D[channels_C].any():
        raise UserError(f"{groups} groups want {codes_GC.shape[1]} channels of the router's input; it has fewer of use")
    mantissa_C, exponent_C = np.frexp(shift * (spread or 1.0) / np.abs(norm_D[channels_C]))
    size_C = np.ldexp(np.round(16 * mantissa_C), exponent_C - 4)  # far from where half precision rounds up or down
    rows_GED = np.repeat(router_ED[None], groups, axis=0)
    rows_GED[:, :, channels_C] += (codes_GC * size_C)[:, None]
    figures = {"spread": float(spread), "channels": channels_C.tolist(), "shift": size_C.tolist()}
    return rows_GED.reshape(-1, router_ED.shape[1]), figures


def group_codes(groups: int) -> np.ndarray:
    """What each group adds on each channel, (G, C): ±1 on one channel for two groups, p channels for another prime p.

    Products of primes take the channels of all; each group leads in an equal part of a symmetric input space.
    """
    prime = next(factor for factor in range(2, groups + 1) if groups % factor == 0)
    first = np.array([[1.0], [-1.0]]) if prime == 2 else np.eye(prime)
    if prime == groups:
        return first
    rest = group_codes(groups // prime)
    return np.hstack([np.repeat(first, len(rest), axis=0), np.tile(rest, (prime, 1))])


def split_expert(gate: np.ndarray, up: np.ndarray, down: np.ndarray, parts: int) -> list[tuple[np.ndarray, ...]]:
    """An expert's gate and up (F, D) and down (D, F) as experts of F/parts neurons, each with `down` times `parts`."""
    width = len(gate) // parts
    spans = [slice(start, start + width) for start in range(0, len(gate), width)]
    return [(gate[span], up[span], (down[:, span].astype(np.float32) * parts).astype(down.dtype)) for span in spans]


def with_noise(down: np.ndarray, copies: int, noise: float, generator: np.random.Generator) -> list[np.ndarray]:
    """`copies` arrays whose sum is `copies · down` exactly: pairs of down ± noise, and down itself for an odd one.

    The noise is added to the integers that the floating-point numbers are stored as, so it is relative to each number's
    power of two. Numbers that it would take across a power of two get none: only between two of them are steps equal.
    """
    if not noise:
        return [down] * copies
    bits = jnp.finfo(down.dtype).nmant
    width = np.dtype(f"i{down.dtype.itemsize}")
    stored = down.view(width)
    mantissa = stored & width.type((1 << bits) - 1)
    most = max(round(noise * (1 << bits)), 1)
    result = [down] * (copies % 2)
    for _ in range(copies // 2):
        step = generator.integers(-most, most, down.shape, width, endpoint=True)
        size = np.abs(step)
        step[(mantissa < size) | (mantissa > (1 << bits) - 1 - size)] = 0
        result += [(stored + step).view(down.dtype), (stored - step).view(down.dtype)]
    return result


def printed_figures(manifest: Manifest) -> Figures:
    shown = {name: getattr(manifest.result, name) for name in ("experts", "top_k", "expert_ffn", "layers")}
    return shown | {f"check_{name}": value for name, value in manifest.figures.get("check", {}).items()}

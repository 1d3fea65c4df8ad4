"""The shape of what a carve makes, and what its options want of the source."""

import dataclasses
from pathlib import Path

from convert.carve.control import control_config
from convert.options import REFIT_STEPS, REFIT_TOKENS, CarveOptions
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES, FamilyName


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
    if options.shared_gate == "fitted" and (options.layout != "shared" or not by_token_clusters(options)):
        raise UserError("--shared-gate fitted: expected --layout shared, and --partition token-clusters")
    if options.overlap < 1 or (options.overlap > 1 and not by_token_clusters(options)):
        raise UserError(f"--overlap: expected 1, or more with --partition token-clusters, got {options.overlap}")
    if options.refit_steps < -1 or (options.refit_steps > 0 and not _takes_steps(options)):
        raise UserError(
            "--refit-steps: expected 0, or more with a refit of --partition token-clusters or --control, or -1 to "
            f"choose it, got {options.refit_steps}"
        )
    if options.control and options.layout != "mixtral":
        raise UserError("--control makes a dense model; --layout shared is about experts")
    if not options.refit_ridge >= 0:
        raise UserError(f"--refit-ridge: expected a positive number, or 0 to choose it, got {options.refit_ridge}")
    if options.control:
        return control_config(dense, options.top_k * dense.ffn * options.overlap // options.experts)
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


def with_refit_steps(options: CarveOptions) -> CarveOptions:
    """The options with the number of gradient steps in place of -1."""
    if options.refit_steps >= 0:
        return options
    enough = _takes_steps(options) and options.calibration_tokens >= REFIT_TOKENS
    return dataclasses.replace(options, refit_steps=REFIT_STEPS if enough else 0)


def _takes_steps(options: CarveOptions) -> bool:
    return bool(options.calibration) and options.refit and (options.control or by_token_clusters(options))


def by_token_clusters(options: CarveOptions) -> bool:
    """Whether experts are chosen in groups (see token_clusters.py)."""
    if options.partition == "auto":
        return not _obstacle_to_token_clusters(options)
    return options.partition == "token-clusters"


def fits_gate(config: ModelConfig, options: CarveOptions) -> bool:
    """Whether the shared expert of a result gets a fitted gate."""
    if options.shared_gate == "auto":
        return bool(config.shared_ffn) and (config.qk_norm or FAMILIES[config.family].in_transformers)
    return options.shared_gate == "fitted"


def _obstacle_to_token_clusters(options: CarveOptions) -> str:
    """What token clusters want and the options do not give; "" if nothing."""
    shares = options.top_k < options.experts < 2 * options.top_k
    if options.experts == options.top_k or (options.experts % options.top_k and not shares):
        return (
            f"expected --experts to be a multiple of --top-k {options.top_k}, or less than twice it and more than it, "
            f"got {options.experts}"
        )
    if not (options.calibration and options.refit and options.router == "auto"):
        return "expected --calibration text, and neither --no-refit nor --router"
    return ""

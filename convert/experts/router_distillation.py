"""Router distillation: an MoE's routers are recalibrated to a teacher; every other weight stays as it is.

A pruned MoE still routes as if the dropped experts were there. The teacher is the model before pruning, or the
dense model that it was carved from. Two ways, one after the other if both are asked for:

ridge   Layer by layer, each brought nearer to the teacher's on what the layers before it, recalibrated, give: ridge
        regressions of the router's change from cached products of the experts' outputs (router_ridge.py).
distil  The whole model: Adam on the routers alone, for KL(teacher ‖ model) of the next token (Hyeon and Do, 2026, arXiv
        2603.02217, Router KD). Adam moves every weight by about its learning rate, so that is a share of each router's
        own deviation: a carved router's may be 1e-5.

The last tenth of the text is held out. Of the change found, all is taken if the model's loss there falls, else a half,
a quarter or an eighth of it, else that of single layers; what does not lower the loss is left. Routers are judged as
they will be stored, rounded to the checkpoint's dtype.

B batch, T tokens (or sequence), D embed, E experts, L MoE layers, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from convert.experts.outputs import stored_routers
from convert.experts.router_ridge import ridge_routers
from convert.layerwise import calibration_batches, fitted_batches
from convert.options import DistillRoutersOptions
from convert.streaming import ConversionSettings, Figures, Manifest, Tensors, convert_layers
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import make_mesh, parse_mesh, use_mesh
from nemoe_jax.spec.router_ties import RouterTies, find_ties
from nemoe_jax.spec.schema import Tree, declare
from nemoe_jax.utils.output_path import refuse_existing
from nemoe_jax.utils.progress import progress_bar

SHARES = (1.0, 0.5, 0.25, 0.125)  # of a change, tried in this order

_ADAM = optax.scale_by_adam()


def distill_routers(
    source: str | Path,
    destination: str | Path,
    options: DistillRoutersOptions,
    run: ConversionSettings = ConversionSettings(),
) -> Manifest:
    """Writes the MoE `source` with recalibrated routers; returns the manifest (see convert/manifest.py).

    Raises:
        UserError: not an MoE, a teacher that does not fit it, bad options, no text, existing destination.
    """
    student, teacher = Checkpoint(source), Checkpoint(options.teacher)
    config = student.config
    _refuse_misfits(config, teacher.config, options, str(source))
    refuse_existing(destination)  # before the text is read
    batches = calibration_batches(student, options.calibration, options.calibration_tokens)
    fitted_batches(batches)  # enough of them
    old_LDE = stored_routers(student)
    if options.method != "distil" and find_ties(old_LDE, config.top_k):
        raise UserError(
            f"{source}: groups of experts share a router row and weigh alike whatever it is: ridge regression would "
            f"part them; --method: expected distil, got {options.method}"
        )
    # a dry run is about the files
    new_LDE, figures = (old_LDE, {}) if run.dry_run else recalibrate(student, teacher, batches, options)
    router = declare(config)["blocks"]["moe"]["ffn"]["router"]

    def layer(number: int) -> tuple[Tensors, Figures]:
        if number < config.dense_layers:
            return {}, {}
        old_DE, new_DE = old_LDE[number - config.dense_layers], new_LDE[number - config.dense_layers]
        change = np.linalg.norm(new_DE - old_DE) / max(np.linalg.norm(old_DE), np.finfo(np.float32).tiny)
        return {router.key_of(number): router.to_torch(new_DE)}, {"router_change": float(change)}

    state = {
        "command": "distill-routers",
        **dataclasses.asdict(options),
        # an interrupted run goes on only if it finds the same routers again
        "routers_sha256": hashlib.sha256(new_LDE.tobytes()).hexdigest(),
    }
    return convert_layers(student, destination, config, layer, state, run=run, summary=lambda: figures)


def _refuse_misfits(student: ModelConfig, teacher: ModelConfig, options: DistillRoutersOptions, source: str) -> None:
    if not student.experts:
        raise UserError(f"{source}: expected an MoE, got a dense model")
    if teacher.vocab != student.vocab:
        raise UserError(f"{options.teacher}: expected the vocabulary of {source}, {student.vocab}, got {teacher.vocab}")
    if options.method != "distil":
        for name in ("layers", "hidden"):
            wanted, got = getattr(student, name), getattr(teacher, name)
            if wanted != got:
                raise UserError(
                    f"{options.teacher}: --method {options.method} wants a teacher with {name} = {wanted} like "
                    f"{source}, got {got}; --method distil takes it"
                )
    for name in ("steps", "learning_rate", "ridge"):
        if not getattr(options, name) > 0:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected a positive number, got {getattr(options, name)}")


def recalibrate(
    student: Checkpoint, teacher: Checkpoint, batches: Sequence[np.ndarray], options: DistillRoutersOptions
) -> tuple[np.ndarray, Figures]:
    """Routers (L, D, E), float32 values of the checkpoint's dtype, and figures for the manifest.

    Args:
        batches: tokens (B, T + 1), int32; the last tenth is held out.
    """
    fitted = fitted_batches(batches)
    mesh = make_mesh(parse_mesh(options.mesh)) if options.mesh else None
    models = [
        pretrained.load_pretrained(model, mesh=mesh, dtype=options.dtype, progress=True) for model in (student, teacher)
    ]

    def held_out_loss(model: tuple[ModelConfig, Tree]) -> float:
        with _on(mesh):
            losses = [_loss(model[0], model[1], tokens_BS) for tokens_BS in batches[fitted:]]
        return float(np.mean([np.asarray(loss) for loss in losses]))

    def loss_with(routers_LDE: np.ndarray) -> float:
        config, params = models[0]
        return held_out_loss((config, with_routers(params, jnp.asarray(routers_LDE))))

    old_LDE = routers_LDE = stored_routers(student)
    before = best = loss_with(old_LDE)
    dtype = jnp.dtype(student.config.dtype)
    if options.method != "distil":
        candidate_LDE = ridge_routers(student, teacher, batches[:fitted], routers_LDE, options.ridge)
        routers_LDE, best = keep_what_helps(routers_LDE, candidate_LDE, loss_with, best, dtype)
    if options.method != "ridge":
        with _on(mesh):
            candidate_LDE = distilled_routers(
                models[0], models[1], batches[:fitted], routers_LDE, options.steps, options.learning_rate
            )
        routers_LDE, best = keep_what_helps(routers_LDE, candidate_LDE, loss_with, best, dtype)
    return routers_LDE, {
        "held_out_tokens": sum(tokens_BS[:, 1:].size for tokens_BS in batches[fitted:]),
        "held_out_loss_teacher": held_out_loss(models[1]),
        "held_out_loss_before": before,
        "held_out_loss_after": best,
        "moe_layers": len(old_LDE),
        "kept": int((routers_LDE != old_LDE).any((1, 2)).sum()),
    }


def _on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return use_mesh(mesh)


def keep_what_helps(
    old_LDE: np.ndarray, new_LDE: np.ndarray, loss_of: Callable[[np.ndarray], float], best: float, dtype: np.dtype
) -> tuple[np.ndarray, float]:
    """Routers between old and new with a lower loss than `best`, the old ones', and that loss.

    The first share of the whole change that lowers it; if there is none, whatever single layers' changes do.
    """

    def between(share: float) -> np.ndarray:
        return (old_LDE + share * (new_LDE - old_LDE)).astype(dtype).astype(np.float32)

    for share in SHARES:
        if (loss := loss_of(between(share))) < best:
            return between(share), loss
    kept_LDE = old_LDE
    for layer in range(len(old_LDE)):
        trial_LDE = kept_LDE.copy()
        trial_LDE[layer] = between(SHARES[0])[layer]
        if (loss := loss_of(trial_LDE)) < best:
            kept_LDE, best = trial_LDE, loss
    return kept_LDE, best


def with_routers(params: Tree, routers_LDE: jax.Array) -> Tree:
    """The parameters with other routers."""
    moe = params["blocks"]["moe"]
    moe = moe | {"ffn": moe["ffn"] | {"router": routers_LDE}}
    return params | {"blocks": params["blocks"] | {"moe": moe}}


@functools.partial(jax.jit, static_argnums=0)
def _loss(config: ModelConfig, params: Tree, tokens_BS: jax.Array) -> jax.Array:
    """Mean next-token loss, nats."""
    logits_BTV = forward(config, params, tokens_BS[:, :-1]).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BS[:, 1:]).mean()


def distilled_routers(
    student: tuple[ModelConfig, Tree],
    teacher: tuple[ModelConfig, Tree],
    batches: Sequence[np.ndarray],
    old_LDE: np.ndarray,
    steps: int,
    learning_rate: float,
) -> np.ndarray:
    """Routers (L, D, E) after gradient steps towards the teacher's next-token distribution, from the old ones.

    Adam works on the change in units of each router's deviation over the experts (what all rows share has no effect).
    Rows that a group of experts shares stay so.
    """
    ties = find_ties(old_LDE, student[0].top_k)
    deviation_L11 = jnp.sqrt(jnp.mean((old_LDE - old_LDE.mean(-1, keepdims=True)) ** 2, axis=(1, 2), keepdims=True))
    change_LDE = jnp.zeros(old_LDE.shape)
    state = _ADAM.init(change_LDE)
    rate = optax.cosine_decay_schedule(learning_rate, steps)
    with progress_bar() as bar:
        for number in bar.track(range(steps), description="distilling routers"):
            tokens_BT = batches[number % len(batches)][:, :-1]
            change_LDE, state = _distil_step(
                *student, *teacher, ties, old_LDE, deviation_L11, change_LDE, state, tokens_BT, rate(number)
            )
    return np.asarray(old_LDE + deviation_L11 * change_LDE)


@functools.partial(jax.jit, static_argnums=(0, 2, 4), donate_argnums=(7, 8))
def _distil_step(
    config,
    params,
    teacher_config,
    teacher,
    ties: RouterTies | None,
    old_LDE,
    deviation_L11,
    change_LDE,
    state,
    tokens_BT,
    rate,
):
    """The change and Adam's state after a step for KL(teacher ‖ student)."""
    log_p_BTV = jax.nn.log_softmax(forward(teacher_config, teacher, tokens_BT).logits)

    def divergence(change_LDE):
        routed = with_routers(params, old_LDE + deviation_L11 * change_LDE)
        log_q_BTV = jax.nn.log_softmax(
            forward(config, routed, tokens_BT, remat=True, whole_groups=ties is not None).logits
        )
        return jnp.mean(jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1))

    gradient_LDE = jax.grad(divergence)(change_LDE)
    updates, state = _ADAM.update(ties.mean(gradient_LDE) if ties else gradient_LDE, state)
    return change_LDE - rate * updates, state


def printed_figures(manifest: Manifest) -> Figures:
    figures = {name: value for name, value in manifest.figures.items() if name.startswith("held_out")}
    return {**figures, "routers": f"kept {manifest.figures['kept']} of {manifest.figures['moe_layers']} layers"}

"""AdamW, or Muon beside it, over whatever tree is trained, with two exceptions that go by a parameter's path.

Norms, or what else the recipe names, have no weight decay. Routers learn at a rate scaled to their own size: a carved
router's weights may deviate by 1e-5, and Adam moves every weight by about the learning rate whatever the gradient's
size, so one step of 1e-3 would replace such a router by noise.
"""

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.router_ties import RouterTies
from nemoe_jax.spec.schema import declare, leaves
from train.recipe import Optimizer

RMS_OF_ADAM = 0.2  # root mean square of a step of Adam over the learning rate, as arXiv 2502.16982 measured it


def path_names(path: tuple[Any, ...]) -> list[str]:
    """A key path of jax.tree_util as the names along it: dictionary keys, each of them perhaps a/b/c, and fields."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path).split("/")


def weight_path(path: tuple[Any, ...]) -> str:
    """The schema's path of a leaf of the trained tree: params/PATH, or adapters/PATH/a and b."""
    names = path_names(path)
    return "/".join(names[1:-1] if names[0] == "adapters" else names[1:])


def is_router(path: tuple[Any, ...]) -> bool:
    """Whether the parameter is a router, or an adapter of one."""
    return "router" in path_names(path)


def learning_rate_schedule(options: Optimizer, steps: int) -> optax.Schedule:
    """Step (from 0) → learning rate: a linear rise over the warm-up, then the schedule down to its final share."""
    peak, rest = options.learning_rate, max(steps - options.warmup_steps, 1)
    if options.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, rest, alpha=options.final_fraction)
    elif options.schedule == "linear":
        fall = optax.linear_schedule(peak, peak * options.final_fraction, rest)
    elif options.schedule == "wsd":
        decay = min(max(round(options.decay_fraction * steps), 1), rest)
        fall = optax.linear_schedule(peak, peak * options.final_fraction, decay, transition_begin=rest - decay)
    else:
        fall = optax.constant_schedule(peak)
    if not options.warmup_steps:
        return fall
    # the first step is already worth taking: it learns at peak / warmup_steps, and the last of the warm-up at the peak
    rise = optax.linear_schedule(peak / options.warmup_steps, peak, max(options.warmup_steps - 1, 1))
    return optax.join_schedules([rise, fall], [options.warmup_steps])


def router_scale(router_LDE: jax.Array, factor: float) -> jax.Array:
    """The learning-rate factor (L, 1, 1) of each layer's router: factor · min(1, RMS / D^-1/2).

    D^-1/2 is the deviation of a freshly initialized router; one smaller than that learns as much slower.
    """
    rms_L11 = jnp.sqrt(jnp.mean(jnp.square(router_LDE.astype(jnp.float32)), axis=(-2, -1), keepdims=True))
    return factor * jnp.minimum(1.0, rms_L11 * router_LDE.shape[-2] ** 0.5)


def make_optimizer(
    options: Optimizer,
    steps: int,
    router_scale_L11: Any = None,
    config: ModelConfig | None = None,
    ties: RouterTies | None = None,
) -> optax.GradientTransformation:
    """Clip by global norm → Adam or Muon → weight decay except where `no_decay` says → schedule → the routers' factor.

    Router rows that are tied have one gradient before all this, and one update after it.

    Args:
        config: the model's, which Muon needs.
        router_scale_L11: from `router_scale`; for every leaf, stacked over the layers, whose path names a router.
    """

    def decays(params: Any) -> Any:
        def decayed(path: tuple[Any, ...], _: Any) -> bool:
            return not any(fnmatch.fnmatchcase(weight_path(path), pattern) for pattern in options.no_decay)

        return jax.tree_util.tree_map_with_path(decayed, params)

    def scale_routers(updates: Any, params: Any) -> Any:
        def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
            return update * router_scale_L11 if router_scale_L11 is not None and is_router(path) else update

        return jax.tree_util.tree_map_with_path(scale, updates)

    plain = optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        _directions(options, config),
        optax.add_decayed_weights(options.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate_schedule(options, steps)),
        optax.stateless(scale_routers),
    )
    return optax.chain(_on_rows(ties.mean), plain, _on_rows(ties.copied)) if ties else plain


def _on_rows(change: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    """What is done to the routers' rows: those of the routers themselves, and of B of their adapters."""

    def changed(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        return change(update) if is_router(path) and path_names(path)[-1] in ("router", "b") else update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(changed, updates))


def _directions(options: Optimizer, config: ModelConfig | None) -> optax.GradientTransformation:
    """Adam; or Muon for the matrices within the blocks (arXiv 2502.16982), scaled to the size of Adam's steps."""
    adam = optax.scale_by_adam(options.beta1, options.beta2)
    if options.name == "adamw":
        return adam
    assert config is not None
    matrices = {
        path: spec
        for path, spec in leaves(declare(config)).items()
        if path.startswith("blocks/") and spec.contracted and not path.endswith("/router")
    }

    def is_matrix(path: tuple[Any, ...]) -> bool:
        return path_names(path)[0] == "params" and weight_path(path) in matrices

    def axes(path: tuple[Any, ...], _: Any) -> optax.contrib.MuonDimensionNumbers:
        """Which of a weight's axes are summed over, and which come out; layers and experts are matrices apart."""
        spec = matrices[weight_path(path)]
        first, last = len(spec.stacked), len(spec.stacked) + len(spec.contracted)
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, last)), tuple(range(last, len(spec.shape))))

    def all_axes(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(axes, params)

    def as_large_as_adam(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        return update * (RMS_OF_ADAM * max(matrices[weight_path(path)].matrix_shape) ** 0.5)

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if is_matrix(path) else "adam", params)

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=options.momentum, weight_dimension_numbers=all_axes),
        optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(as_large_as_adam, updates)),
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)

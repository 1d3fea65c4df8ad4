"""Losses against torch, the optimizer against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.loss import cross_entropy, forward_kl
from train.optimizer import learning_rate_schedule, make_optimizer, router_scale
from train.recipe import Optimizer

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 3, 5, 11)).astype(np.float32) * 3
TARGETS = RNG.integers(0, 11, (3, 5))
MASK = RNG.integers(0, 2, (3, 5))


def test_cross_entropy_equals_torch():
    student, targets = torch.tensor(STUDENT).flatten(0, 1), torch.tensor(TARGETS).flatten()
    wanted = torch.nn.functional.cross_entropy(student, targets)
    np.testing.assert_allclose(cross_entropy(STUDENT, TARGETS), wanted, rtol=1e-6)
    masked = torch.nn.functional.cross_entropy(student, torch.where(torch.tensor(MASK).flatten() == 1, targets, -100))
    np.testing.assert_allclose(cross_entropy(STUDENT, TARGETS, MASK), masked, rtol=1e-6)


def test_forward_kl_equals_torch():
    logs = [torch.log_softmax(torch.tensor(logits), -1) for logits in (STUDENT, TEACHER)]
    per_token = torch.nn.functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).numpy()
    np.testing.assert_allclose(forward_kl(STUDENT, TEACHER), per_token.mean(), rtol=1e-5)
    np.testing.assert_allclose(forward_kl(STUDENT, TEACHER, MASK), per_token[MASK == 1].mean(), rtol=1e-5)
    assert abs(forward_kl(TEACHER, TEACHER)) < 1e-6
    assert abs(forward_kl(STUDENT, TEACHER) - forward_kl(TEACHER, STUDENT)) > 1e-2  # forward, not reverse


def test_losses_are_computed_in_float32():
    huge = jnp.asarray(STUDENT * 100, jnp.bfloat16)
    for loss in (cross_entropy(huge, TARGETS), forward_kl(huge, jnp.asarray(TEACHER, jnp.bfloat16))):
        assert loss.dtype == jnp.float32 and jnp.isfinite(loss)


def test_masked_positions_leave_no_trace():
    spoilt = STUDENT.copy()
    spoilt[MASK == 0] = 1e30
    value, gradient = jax.value_and_grad(cross_entropy)(jnp.asarray(spoilt), TARGETS, MASK)
    np.testing.assert_allclose(value, cross_entropy(STUDENT, TARGETS, MASK), rtol=1e-6)
    assert jnp.isfinite(gradient).all() and (gradient[MASK == 0] == 0).all()
    assert cross_entropy(STUDENT, TARGETS, np.zeros_like(MASK)) == 0


def test_gradient_of_forward_kl_is_the_difference_of_probabilities():
    gradient = jax.grad(forward_kl)(jnp.asarray(STUDENT), TEACHER)
    wanted = (jax.nn.softmax(STUDENT) - jax.nn.softmax(TEACHER)) / MASK.size
    np.testing.assert_allclose(gradient, wanted, atol=1e-7)


@pytest.mark.parametrize(
    "schedule, middle, last",
    [("cosine", 0.1 + 0.9 * 0.5, 0.1), ("linear", 0.1 + 0.9 * 0.5, 0.1), ("constant", 1.0, 1.0)],
)
def test_schedule(schedule, middle, last):
    options = Optimizer(learning_rate=0.2, warmup_steps=4, schedule=schedule, final_fraction=0.1)
    rate = learning_rate_schedule(options, steps=24)
    np.testing.assert_allclose([rate(step) for step in range(5)], [0.05, 0.1, 0.15, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose([rate(14), rate(24)], [0.2 * middle, 0.2 * last], rtol=1e-5)
    no_warmup = learning_rate_schedule(options.model_copy(update={"warmup_steps": 0}), steps=24)
    np.testing.assert_allclose([no_warmup(0), no_warmup(24)], [0.2, 0.2 * last], rtol=1e-6)


def test_first_step_is_adamw_without_decay_on_norms_and_with_small_steps_for_small_routers():
    options = Optimizer(learning_rate=0.1, weight_decay=0.5, schedule="constant", router_learning_rate_scale=0.5)
    rng = np.random.default_rng(1)
    router_LDE = rng.normal(size=(2, 64, 3)) * np.array([1e-4, 10.0])[:, None, None]
    params = {
        "blocks/moe/attn_norm": rng.normal(size=(2, 4)),
        "blocks/moe/attn/q_norm": rng.normal(size=(2, 4)),
        "norm": rng.normal(size=4),
        "head": rng.normal(size=(4, 7)),
        "blocks/moe/ffn/router": router_LDE,
    }
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)
    gradient = jax.tree.map(lambda array: jnp.asarray(rng.choice([-0.1, 0.1], array.shape), jnp.float32), params)
    scale_L11 = router_scale(params["blocks/moe/ffn/router"], options.router_learning_rate_scale)
    rms = np.sqrt((np.asarray(params["blocks/moe/ffn/router"])[0] ** 2).mean())
    np.testing.assert_allclose(scale_L11.ravel(), [0.5 * rms * 8, 0.5], rtol=1e-5)

    optimizer = make_optimizer(options, 10, scale_L11)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    for name, update in updates.items():
        decay = 0.0 if name.endswith("norm") else 0.5 * np.asarray(params[name])
        step = -0.1 * (np.sign(gradient[name]) + decay)  # Adam's first step is the gradient's sign
        step = step * np.asarray(scale_L11) if name.endswith("router") else step
        np.testing.assert_allclose(update, step, rtol=1e-4, atol=1e-6 * np.abs(step).max(), err_msg=name)


def test_gradients_are_clipped_by_their_global_norm():
    options = Optimizer(learning_rate=1.0, schedule="constant", clip_norm=0.5, beta1=0.0, beta2=0.0)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    gradient = {"a": jnp.full(3, 2.0), "b": jnp.full(4, -2.0)}
    clip_alone = make_optimizer(options, 10)
    _, (_, adam, *_) = clip_alone.update(gradient, clip_alone.init(params), params)
    np.testing.assert_allclose(optax.global_norm(adam.mu), 0.5, rtol=1e-6)

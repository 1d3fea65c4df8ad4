"""Losses against torch, the optimizer against NumPy."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nemoe_jax.adapters import lora
from nemoe_jax.model.next_token import token_logprobs
from nemoe_jax.spec.schema import declare, leaves
from tests.support.train_runs import MIXTURE, random_params
from train.recipe import Optimizer
from train.step.divergence import divergence, top_k_divergence
from train.step.loss import chunked_sums, masked_sum
from train.step.optimizer import learning_rate_schedule, make_optimizer, router_scale
from train.step.step import initial_state, split

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 3, 5, 11)).astype(np.float32) * 3
TARGETS = RNG.integers(0, 11, (3, 5))
MASK = RNG.integers(0, 2, (3, 5))


def test_log_probabilities_of_tokens_equal_torch_s_cross_entropy():
    student, targets = torch.tensor(STUDENT).flatten(0, 1), torch.tensor(TARGETS).flatten()
    expected = torch.nn.functional.cross_entropy(student, targets, reduction="none")
    np.testing.assert_allclose(-token_logprobs(STUDENT, TARGETS).ravel(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["forward", "reverse", "skew-forward", "skew-reverse"])
def test_divergences_equal_torch(kind, temperature):
    log_q, log_p = (torch.log_softmax(torch.tensor(logits) / temperature, -1) for logits in (STUDENT, TEACHER))
    own, other = (log_q, log_p) if kind.endswith("reverse") else (log_p, log_q)
    other = torch.log(0.3 * own.exp() + 0.7 * other.exp()) if kind.startswith("skew") else other
    expected = temperature**2 * torch.nn.functional.kl_div(other, own, log_target=True, reduction="none").sum(-1)
    found = divergence(kind, STUDENT, TEACHER, temperature, 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert abs(divergence(kind, TEACHER, TEACHER, temperature, 0.3)).max() < 1e-5


@pytest.mark.parametrize("kind", ["forward", "skew-reverse"])
def test_of_the_likeliest_tokens_the_divergence_is_that_of_their_coarser_distributions(kind):
    ids = np.argsort(-TEACHER, -1)[..., :4]
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(TEACHER)), ids, -1)
    found = top_k_divergence(kind, STUDENT, ids, log_p, skew=0.3)

    def coarse(logits):
        probabilities = np.asarray(jax.nn.softmax(logits))
        kept = np.take_along_axis(probabilities, ids, -1)
        return np.log(np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1))

    np.testing.assert_allclose(found, divergence(kind, coarse(STUDENT), coarse(TEACHER), skew=0.3), rtol=1e-4)
    assert (found <= divergence(kind, STUDENT, TEACHER, skew=0.3) + 1e-6).all()
    all_ids = np.argsort(-TEACHER, -1)
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(TEACHER)), all_ids, -1)
    whole = top_k_divergence("forward", STUDENT, all_ids[..., :-1], log_p[..., :-1])
    np.testing.assert_allclose(whole, divergence("forward", STUDENT, TEACHER), rtol=1e-3, atol=1e-5)


def test_losses_are_computed_in_float32():
    huge = jnp.asarray(STUDENT * 100, jnp.bfloat16)
    for loss in (token_logprobs(huge, TARGETS), divergence("forward", huge, jnp.asarray(TEACHER, jnp.bfloat16))):
        assert loss.dtype == jnp.float32 and jnp.isfinite(loss).all()


def test_masked_tokens_leave_no_trace():
    values = np.where(MASK, STUDENT[..., 0], np.inf)
    value, gradient = jax.value_and_grad(masked_sum)(jnp.asarray(values), jnp.asarray(MASK, jnp.float32))
    np.testing.assert_allclose(value, STUDENT[..., 0][MASK == 1].sum(), rtol=1e-5)
    np.testing.assert_array_equal(gradient, MASK)


def _of_chunk(trained, chunk, rest):
    logits = chunk["hidden"] @ trained["head"] + rest["bias"]
    entropy = masked_sum(-token_logprobs(logits, chunk["targets"]), chunk["mask"])
    return 0.5 * entropy, {"entropy": entropy, "tokens": chunk["mask"].sum()}


@pytest.mark.parametrize("chunk", [1, 4, 7, 15, 100])
def test_chunks_give_the_sums_and_gradients_of_the_whole(chunk):
    """Against plain differentiation over all tokens at once; 5 tokens a row divide by none of the chunks but 15."""
    hidden, head = jnp.asarray(STUDENT[..., :6]), {"head": jnp.asarray(RNG.normal(size=(6, 11)), jnp.float32)}
    tokens = {"targets": jnp.asarray(TARGETS), "mask": jnp.asarray(MASK, jnp.float32)}
    rest = {"bias": jnp.arange(11.0)}

    def chunked(head, hidden):
        total, sums = chunked_sums(_of_chunk, head, hidden, tokens, rest, chunk)
        return 3 * total, sums

    def plain(head, hidden):
        total, sums = _of_chunk(head, {"hidden": hidden} | tokens, rest)
        return 3 * total, sums

    (value, sums), gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(head, hidden)
    (expected, sums_), gradients_ = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(head, hidden)
    for got, want in zip(
        jax.tree.leaves((value, sums, gradients)), jax.tree.leaves((expected, sums_, gradients_)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(chunked)(head, hidden)[0], expected, rtol=1e-6)  # without a gradient as well


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9, 15])
def test_the_head_runs_on_the_tokens_that_count_alone(count):
    """Losses and gradients as of all tokens, in as few chunks of 4 as hold those that count."""
    hidden, head = jnp.asarray(STUDENT[..., :6]), jnp.asarray(RNG.normal(size=(6, 11)), jnp.float32)
    mask = np.zeros(15, "f4")
    mask[RNG.permutation(15)[:count]] = 1
    tokens = {"targets": jnp.asarray(TARGETS), "mask": jnp.asarray(mask.reshape(3, 5))}

    def of_chunk(head, chunk, rest):
        entropy = masked_sum(-token_logprobs(chunk["hidden"] @ head, chunk["targets"]), chunk["mask"])
        return entropy, {"chunks": jnp.float32(1)}

    def plain(head, hidden):
        return masked_sum(-token_logprobs(hidden @ head, tokens["targets"]), tokens["mask"])

    expected, gradients_ = jax.value_and_grad(plain, argnums=(0, 1))(head, hidden)
    for all_count in (False, True):

        def chunked(head, hidden, all_count=all_count):
            return chunked_sums(of_chunk, head, hidden, tokens, {}, 4, all_count)

        (value, sums), gradients = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)(head, hidden)
        assert sums["chunks"] == (4 if all_count else -(-count // 4))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for got, want in zip(gradients, gradients_, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_no_logits_of_all_tokens_are_held(optimized):
    """Compiled memory of value and gradient: a few chunks' logits, far below those of all tokens."""
    batch, length, width, vocabulary, chunk = 2, 512, 16, 8192, 64
    head = {"head": jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)}
    tokens = {name: jax.ShapeDtypeStruct((batch, length), kind) for name, kind in (("targets", "i4"), ("mask", "f4"))}
    rest = {"bias": jax.ShapeDtypeStruct((vocabulary,), jnp.float32)}

    def value(hidden, head, tokens, rest, chunk):
        if chunk is None:
            return _of_chunk(head, {"hidden": hidden} | tokens, rest)[0]
        return chunked_sums(_of_chunk, {"head": jax.lax.stop_gradient(head["head"])}, hidden, tokens, rest, chunk)[0]

    def memory(chunk):
        hidden = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
        program = jax.jit(jax.grad(value), static_argnums=4).lower(hidden, head, tokens, rest, chunk).compile()
        return program.memory_analysis().temp_size_in_bytes

    logits = 4 * batch * length * vocabulary
    assert memory(None) > logits
    assert memory(chunk) < 0.3 * logits


@pytest.mark.parametrize(
    "schedule, middle, last",
    [("cosine", 0.1 + 0.9 * 0.5, 0.1), ("linear", 0.1 + 0.9 * 0.5, 0.1), ("wsd", 1.0, 0.1), ("constant", 1.0, 1.0)],
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
    trees = {"params": params}, {"params": gradient}
    updates, _ = optimizer.update(trees[1], optimizer.init(trees[0]), trees[0])
    for name, update in updates["params"].items():
        decay = 0.0 if name.endswith("norm") else 0.5 * np.asarray(params[name])
        step = -0.1 * (np.sign(gradient[name]) + decay)  # Adam's first step is the gradient's sign
        step = step * np.asarray(scale_L11) if name.endswith("router") else step
        np.testing.assert_allclose(update, step, rtol=1e-4, atol=1e-6 * np.abs(step).max(), err_msg=name)


def test_wsd_is_stable_and_then_falls_over_the_last_fifth():
    options = Optimizer(learning_rate=0.2, warmup_steps=4, schedule="wsd", decay_fraction=0.2, final_fraction=0.5)
    rate = learning_rate_schedule(options, steps=40)
    np.testing.assert_allclose([rate(step) for step in (4, 31, 32, 36, 40)], [0.2, 0.2, 0.2, 0.15, 0.1], rtol=1e-5)


def test_muon_steps_along_orthogonal_matrices_and_leaves_the_rest_to_adam():
    """Against the singular value decomposition: five Newton-Schulz iterations bring every singular value near 1."""
    rng, config = np.random.default_rng(3), MIXTURE
    params = {path: jnp.asarray(array) for path, array in leaves(random_params(config)).items()}
    adapters = lora.initialize(config, [lora.Target("blocks/*/attn/q", 2, 4.0)], jax.random.key(0))
    tree = {"params": params, "adapters": adapters}
    gradient = jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape), jnp.float32), tree)
    options = Optimizer(name="muon", learning_rate=0.1, schedule="constant", clip_norm=1e9)
    optimizer, adam = (
        make_optimizer(options.model_copy(update={"name": name}), 10, None, config) for name in ("muon", "adamw")
    )
    state = initial_state(tree, optimizer, 0)  # shapes and shardings of Muon's state are found
    updates, _ = jax.jit(optimizer.update)(gradient, state.optimizer_state, tree)
    expected, _ = jax.jit(adam.update)(gradient, adam.init(tree), tree)
    specs = leaves(declare(config))
    orthogonal = {path for path in params if path.startswith("blocks/") and "norm" not in path and "router" not in path}
    for path, update in updates["params"].items():
        if path not in orthogonal:
            np.testing.assert_allclose(update, expected["params"][path], rtol=1e-5)
            continue
        rows, columns = specs[path].matrix_shape
        matrix, moved = (
            np.asarray(tree[path]).reshape(-1, rows, columns)[-1] for tree in (gradient["params"], updates["params"])
        )
        u, _, v = np.linalg.svd(matrix, full_matrices=False)
        inside = np.diag(u.T @ (moved / (-0.1 * 0.2 * max(rows, columns) ** 0.5)) @ v.T)
        assert inside.min() > 0.6 and inside.max() < 1.3, path
    for one, other in zip(jax.tree.leaves(updates["adapters"]), jax.tree.leaves(expected["adapters"]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    options = Optimizer(learning_rate=1.0, schedule="constant", clip_norm=0.5, beta1=0.0, beta2=0.0)
    params = {"params": {"a": jnp.zeros(3), "b": jnp.zeros(4)}}
    gradient = {"params": {"a": jnp.full(3, 2.0), "b": jnp.full(4, -2.0)}}
    clip_alone = make_optimizer(options, 10)
    _, (_, adam, *_) = clip_alone.update(gradient, clip_alone.init(params), params)
    np.testing.assert_allclose(optax.global_norm(adam.mu), 0.5, rtol=1e-6)


def test_in_bfloat16_injected_hyperparameters_would_be_rounded():
    """What the next tests guard against: optax casts injected rates to the dtype of the first leaf."""
    optimizer = optax.inject_hyperparams(optax.adam)(1e-3, b2=0.999)
    state = optimizer.init({"w": jnp.ones(3, jnp.bfloat16)})
    assert state.hyperparams["b2"] == 1


def test_no_module_injects_hyperparameters():
    root = Path(__file__).parents[2]
    files = [file for package in ("nemoe_jax", "convert", "train") for file in (root / package).rglob("*.py")]
    assert len(files) > 100
    assert not [file for file in files if "inject_hyperparams" in file.read_text("utf-8")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_trained_is_float32_whatever_the_model_s_dtype(dtype):
    params = {"a": jnp.ones((2, 3), dtype), "b": {"c": jnp.ones(4, dtype)}}
    optimizer = make_optimizer(Optimizer(learning_rate=1e-3, beta2=0.999), 10)
    trained, frozen = split(params, lambda path: path == "a", dtype)
    state = initial_state(trained, optimizer, 0)
    arrays = [*jax.tree.leaves(state.trainable), *jax.tree.leaves(state.optimizer_state)]
    assert {array.dtype.name for array in arrays} == {"float32", "int32"}  # int32: the counts of steps
    assert frozen["b/c"].dtype == dtype
    with pytest.raises(TypeError, match=f"expected float32 for what is trained, got {dtype}"):
        initial_state({"a": params["a"]}, optimizer, 0)

"""Distilled routers: what is kept, what is never worse, and the layer fits against least squares in NumPy."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import cli
from convert.experts import router_distillation, router_ridge
from convert.experts.outputs import expert_products, routing
from convert.experts.router_distillation import DistillRoutersOptions, keep_what_helps, recalibrate
from convert.experts.router_ridge import fitted_router
from convert.streaming import MANIFEST, ConversionSettings, Writer
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema
from tests.support.compiled import forward, normal
from tests.support.configs import DENSE, MIXTRAL, NEKOMIND, write_tokenizer

LENGTH = 8


@functools.partial(jax.jit, static_argnums=0)
def next_logits(config, params, tokens, length):
    return forward(config, params, tokens).logits[:, length - 1]


def sampled_text(config, params, sequences):
    """Tokens (sequences, LENGTH + 1) that the model itself wrote: no other router has a lower loss on them."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab, (sequences, LENGTH + 1)).astype(np.int32)
    for length in range(1, LENGTH + 1):
        logits = np.asarray(next_logits(config, params, tokens, length))
        tokens[:, length] = np.argmax(logits + random.gumbel(size=logits.shape), axis=-1)
    return tokens


def sharpened(config):
    """Random weights of which the routers decide much: strong experts, and a sharp head."""
    params = schema.initialize(config, jax.random.key(3))
    ffn = params["blocks"]["moe"]["ffn"]
    ffn["router"], ffn["down"] = 2 * ffn["router"], 12 * ffn["down"]
    params["embed" if config.tied else "head"] *= 3
    return params


def save_words(directory, config, params):
    """A model directory with a tokenizer of whole words."""
    pretrained.save_pretrained(directory, config, params)
    write_tokenizer(directory)
    return directory


def with_noise(params, noise):
    ffn = params["blocks"]["moe"]["ffn"]
    router = ffn["router"]
    return router_distillation.with_routers(params, router + normal(jax.random.key(9), router.shape, noise))


@functools.cache
def models(config):
    """(a model, the same with noise on its routers, text that the model wrote)."""
    params = sharpened(config)
    return params, with_noise(params, 0.5), sampled_text(config, params, 160)


@pytest.fixture
def pair(tmp_path, request):
    """(the model with noise on its routers, the model): directories; and text that the model wrote."""
    config = getattr(request, "param", MIXTRAL)
    params, noisy, tokens = models(config)
    save_words(tmp_path / "teacher", config, params)
    save_words(tmp_path / "student", config, noisy)
    return tmp_path / "student", tmp_path / "teacher", tokens.copy()


OPTIONS = DistillRoutersOptions("", (), "both", steps=40, learning_rate=0.1)


@pytest.mark.parametrize(
    "pair", [MIXTRAL.replace(dtype="bfloat16"), NEKOMIND], ids=["mixtral", "nekomind"], indirect=True
)
def test_noise_on_routers_is_undone(pair):
    student, teacher, tokens = pair
    batches = list(tokens.reshape(-1, 8, LENGTH + 1))
    routers_LDE, figures = recalibrate(Checkpoint(student), Checkpoint(teacher), batches, OPTIONS)
    before, after, best = (figures[f"held_out_loss_{name}"] for name in ("before", "after", "teacher"))
    assert figures["held_out_tokens"] == 2 * 8 * LENGTH and figures["kept"] == figures["moe_layers"] == 3
    assert after < before - 0.3 * (before - best)
    dtype = Checkpoint(student).config.dtype
    np.testing.assert_array_equal(routers_LDE, routers_LDE.astype(jnp.dtype(dtype)).astype(np.float32))
    # the reported loss is that of the returned routers
    config, params = pretrained.load_pretrained(student, dtype=jnp.float32)
    routed = router_distillation.with_routers(params, routers_LDE)
    losses = []
    for tokens_BS in batches[-2:]:
        log_p = jax.nn.log_softmax(forward(config, routed, tokens_BS[:, :-1]).logits)
        losses.append(-np.take_along_axis(np.asarray(log_p), tokens_BS[:, 1:, None], axis=-1).mean())
    assert abs(np.mean(losses) - after) < 1e-5


def test_rows_that_a_group_shares_learn_as_one(tmp_path):
    """Each group's experts weigh 1/4 whatever their row is: only the choice among groups can be learned."""
    params = sharpened(MIXTRAL)
    router_LDE = jnp.tile(params["blocks"]["moe"]["ffn"]["router"][..., :4], 4)
    taught = router_distillation.with_routers(params, router_LDE)
    noise = jnp.tile(normal(jax.random.key(9), (3, 24, 4), 0.5), 4)
    save_words(tmp_path / "teacher", MIXTRAL, taught)
    student = save_words(tmp_path / "student", MIXTRAL, router_distillation.with_routers(params, router_LDE + noise))
    batches = list(sampled_text(MIXTRAL, taught, 160).reshape(-1, 8, LENGTH + 1))
    options = DistillRoutersOptions("", (), steps=40, learning_rate=0.1)
    routers_LDE, figures = recalibrate(Checkpoint(student), Checkpoint(tmp_path / "teacher"), batches, options)
    before, after, best = (figures[f"held_out_loss_{name}"] for name in ("before", "after", "teacher"))
    assert after < before - 0.1 * (before - best)
    np.testing.assert_array_equal(routers_LDE, np.tile(routers_LDE[..., :4], 4))

    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number % 69}" for number in range(2000)))
    with pytest.raises(UserError, match=r"student: groups of experts share a router row.*expected distil, got both"):
        options = dataclasses.replace(
            OPTIONS, teacher=str(tmp_path / "teacher"), calibration=(str(text),), calibration_tokens=900
        )
        router_distillation.distill_routers(student, tmp_path / "distilled", options)


def test_a_dense_teacher_never_makes_it_worse(pair, tmp_path):
    pretrained.save_pretrained(tmp_path / "dense", DENSE, schema.initialize(DENSE, jax.random.key(0)))
    batches = list(pair[2][:32].reshape(-1, 8, LENGTH + 1))  # which that teacher did not write
    routers_LDE, figures = recalibrate(Checkpoint(pair[0]), Checkpoint(tmp_path / "dense"), batches, OPTIONS)
    assert figures["held_out_loss_after"] <= figures["held_out_loss_before"]
    changed = (routers_LDE != router_distillation.stored_routers(Checkpoint(pair[0]))).any((1, 2))
    assert figures["kept"] == changed.sum()
    assert (figures["held_out_loss_after"] < figures["held_out_loss_before"]) == changed.any()


OLD = np.zeros((3, 2, 2), np.float32)
NEW = np.ones((3, 2, 2), np.float32) * 0.7


@pytest.mark.parametrize(
    ("best", "expected"),  # the routers at which the loss is least
    [(NEW, NEW), (0.4 * NEW, 0.5 * NEW), (0.1 * NEW, 0.125 * NEW), (-NEW, OLD), (OLD, OLD)],
    ids=["all", "half", "an eighth", "nothing", "nothing to gain"],
)
def test_the_change_is_kept_as_far_as_it_helps(best, expected):
    loss = lambda routers: float(np.sum((routers - best) ** 2))  # noqa: E731
    got, got_loss = keep_what_helps(OLD, NEW, loss, loss(OLD), np.dtype(np.float32))
    np.testing.assert_array_equal(got, expected)
    assert got_loss == loss(got) <= loss(OLD)


def test_layers_that_help_are_kept_without_the_others():
    best = np.stack([NEW[0], -9 * NEW[0], NEW[0]])
    loss = lambda routers: float(np.sum((routers - best) ** 2))  # noqa: E731
    got, got_loss = keep_what_helps(OLD, NEW, loss, loss(OLD), np.dtype(np.float32))
    np.testing.assert_array_equal(got, np.stack([NEW[0], OLD[0], NEW[0]]))
    assert got_loss == loss(got)


def test_candidates_are_judged_as_they_are_stored():
    seen = []
    keep_what_helps(OLD, NEW, lambda routers: seen.append(routers.max()) or 1.0, 0.0, jnp.dtype("bfloat16"))
    stored = {float(jnp.bfloat16(share * 0.7)) for share in router_distillation.SHARES}
    assert {float(value) for value in seen} == stored and np.float32(0.7) not in stored


@pytest.fixture
def layer():
    """A layer's FFN, its input (tokens, D), and G, the experts' outputs' products."""
    random = np.random.default_rng(5)
    specs = schema.declare(MIXTRAL)["blocks"]["moe"]["ffn"]
    ffn = {name: random.normal(size=specs[name].shape[1:]).astype(np.float32) for name in specs}
    ffn["router"] *= 0.2
    x_BTD = random.normal(size=(8, 40, MIXTRAL.hidden)).astype(np.float32)
    _, gram_TEE = expert_products(ffn, x_BTD)
    return ffn, x_BTD.reshape(-1, MIXTRAL.hidden), np.asarray(gram_TEE)


def squared_error(router, x_TD, gram_TEE, target_TE):
    """Of the mixture with that router to the mixture with the target weights, relative."""
    weights_TE = np.asarray(routing(MIXTRAL, jnp.asarray(x_TD @ router))[0])
    change, target = weights_TE - target_TE, np.einsum("TEF,TF->TE", gram_TEE, target_TE)
    return np.einsum("TE,TEF,TF", change, gram_TEE, change) / np.sum(target_TE * target)


def test_a_fitted_router_comes_nearer_to_the_one_that_the_teacher_has(layer):
    ffn, x_TD, gram_TEE = layer
    target_TE = np.asarray(routing(MIXTRAL, jnp.asarray(x_TD @ ffn["router"]))[0])
    moment_TE = np.einsum("TEF,TF->TE", gram_TEE, target_TE)
    fit = functools.partial(fitted_router, MIXTRAL, x_TD=x_TD, gram_TEE=gram_TEE, moment_TE=moment_TE)
    np.testing.assert_allclose(fit(ffn["router"], ridge=0.01), ffn["router"], atol=1e-4)
    noisy = ffn["router"] + 0.05 * np.random.default_rng(1).normal(size=ffn["router"].shape).astype(np.float32)
    before, after, held = (
        squared_error(router, x_TD, gram_TEE, target_TE)
        for router in (noisy, np.asarray(fit(noisy, ridge=0.01)), np.asarray(fit(noisy, ridge=1e6)))
    )
    assert after < 0.5 * before
    assert before * 0.99 < held <= before * 1.0001


def test_one_step_is_the_ridge_regression_of_the_linearised_layer(layer, monkeypatch):
    ffn, x_TD, gram_TEE = layer
    x_TD, gram_TEE = x_TD[:64], gram_TEE[:64]
    random = np.random.default_rng(2)
    target_TE = random.dirichlet(np.ones(16), len(x_TD))
    moment_TE = np.einsum("TEF,TF->TE", gram_TEE, target_TE)
    monkeypatch.setattr(router_ridge, "ROUNDS", 1)
    monkeypatch.setattr(router_ridge, "SHARES", (1.0,))
    monkeypatch.setattr(router_ridge, "ITERATIONS", 500)
    arguments = ffn["router"], x_TD, gram_TEE, moment_TE.astype(np.float32)
    got = fitted_router.__wrapped__(MIXTRAL, *arguments, 1.0) - ffn["router"]

    weights_TE = np.asarray(routing(MIXTRAL, jnp.asarray(x_TD @ ffn["router"]))[0], np.float64)
    size = x_TD.shape[1] * 16
    curvature, slope = np.zeros((size, size)), np.zeros(size)
    for x, gram, moment, weights in zip(x_TD, gram_TEE, moment_TE, weights_TE, strict=True):
        jacobian = np.kron(x, np.diag(weights) - np.outer(weights, weights))  # of the weights by the router (D·E)
        curvature += jacobian.T @ gram @ jacobian
        slope += jacobian.T @ (moment - gram @ weights)
    probe = np.asarray(jax.random.rademacher(jax.random.key(0), (size,), jnp.float32))
    expected = np.linalg.solve(curvature + probe @ curvature @ probe / size * np.eye(size), slope)
    np.testing.assert_allclose(np.ravel(got), expected, atol=2e-3 * np.abs(expected).max())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word{number}" for number in np.random.default_rng(0).integers(0, 69, 97 * 16)))
    return path


def command_of(pair, text, *flags):
    student, teacher, _ = pair
    common = ["--calibration", str(text), "--teacher", str(teacher), "--calibration-tokens", "1500", "--steps", "3"]
    return ["distill-routers", str(student), str(student.parent / "distilled"), *common, *flags]


def tensors_of(directory):
    source = Checkpoint(directory)
    return {key: np.asarray(source.view(key)) for key in source.files}


@pytest.mark.parametrize("helps", [True, False])
def test_the_command_changes_routers_only_and_says_how_many(pair, text, capsys, monkeypatch, helps):
    def one_layer(student, teacher, batches, old_LDE, *rest):
        return old_LDE + np.array([0, 1, 0], np.float32)[:, None, None] * np.eye(24, 16, dtype=np.float32)

    losses = {(False, True): 2.0, (False, False): 2.0, (True, True): 1.0, (True, False): 2.0}
    old = router_distillation.stored_routers(Checkpoint(pair[0]))
    monkeypatch.setattr(router_distillation, "distilled_routers", one_layer)
    monkeypatch.setattr(router_distillation, "_loss", lambda config, params, tokens: losses[(
        bool((params["blocks"]["moe"]["ffn"]["router"] != old).any()), helps)])  # fmt: skip
    assert cli.main(command_of(pair, text, "--json")) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["routers"] == ("kept 1 of 3 layers" if helps else "kept 0 of 3 layers")
    assert figures["held_out_loss_after"] == (1.0 if helps else figures["held_out_loss_before"])
    before, after = tensors_of(pair[0]), tensors_of(pair[0].parent / "distilled")
    changed = [key for key in before if not np.array_equal(before[key], after[key])]
    assert changed == (["model.layers.1.block_sparse_moe.gate.weight"] if helps else [])
    if helps:
        key = changed[0]
        np.testing.assert_allclose(after[key] - before[key], np.eye(16, 24), atol=1e-6)
    manifest = json.loads((pair[0].parent / "distilled" / MANIFEST).read_text())
    assert [layer["router_change"] > 0 for layer in manifest["layers"]] == [False, helps, False]


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(pair, text, tmp_path, monkeypatch):
    options = DistillRoutersOptions(str(pair[1]), (str(text),), calibration_tokens=1500, steps=3)
    expected = router_distillation.distill_routers(
        pair[0], tmp_path / "whole", options, ConversionSettings(shard_bytes=1)
    )
    write = Writer.write

    def interrupt(self, unit, *rest):
        if unit == 2:
            raise KeyboardInterrupt
        return write(self, unit, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            router_distillation.distill_routers(
                pair[0], tmp_path / "distilled", options, ConversionSettings(shard_bytes=1)
            )
    assert (
        router_distillation.distill_routers(pair[0], tmp_path / "distilled", options, ConversionSettings(shard_bytes=1))
        == expected
    )
    assert expected.figures["held_out_loss_after"] <= expected.figures["held_out_loss_before"]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "distilled" / path.name).read_bytes() == path.read_bytes()


def test_on_a_mesh(pair):
    student, teacher, tokens = pair
    batches = list(tokens[:32].reshape(-1, 8, LENGTH + 1))
    alone, apart = (
        recalibrate(
            Checkpoint(student), Checkpoint(teacher), batches, DistillRoutersOptions("", (), steps=2, mesh=mesh)
        )
        for mesh in ("", "data=2,expert=4")
    )
    assert alone[1] == pytest.approx(apart[1], rel=1e-4)
    np.testing.assert_allclose(apart[0], alone[0], atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps: expected a positive number, got 0"),
        (["--learning-rate", "-1"], "--learning-rate: expected a positive number, got -1"),
        (["--ridge", "0"], "--ridge: expected a positive number, got 0"),
        (["--calibration-tokens", "700"], "--calibration-tokens: expected more than 768, for two batches"),
        (["--calibration", "nowhere.txt"], "nowhere.txt: no text there"),
        (["--mesh", "data=3"], "mesh data 3 wants 3 devices; there are 8"),
        (["--teacher", "TMP/small"], "small: expected the vocabulary of "),
        (["--teacher", "TMP/shallow", "--method", "both"], "--method both wants a teacher with layers = 3 like "),
    ],
)
def test_bad_options_are_one_line_and_exit_status_2(pair, text, tmp_path, capsys, flags, message):
    for name, config in (("small", DENSE.replace(vocab=71)), ("shallow", DENSE.replace(layers=2))):
        if f"TMP/{name}" in flags:
            pretrained.save_pretrained(tmp_path / name, config, schema.initialize(config, jax.random.key(0)))
    flags = [flag.replace("TMP", str(tmp_path)) for flag in flags]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert cli.main(command_of(pair, text, *flags)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_dense_model_has_no_routers(pair, text, tmp_path, capsys):
    pretrained.save_pretrained(tmp_path / "dense", DENSE, schema.initialize(DENSE, jax.random.key(0)))
    assert cli.main(command_of((tmp_path / "dense", pair[1], None), text)) == 2
    assert "dense: expected an MoE, got a dense model" in capsys.readouterr().err

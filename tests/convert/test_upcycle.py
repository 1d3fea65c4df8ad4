"""Upcycled mixtures against their sources: the same logits, the same choices, the same bits."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import cli
from convert.experts.upcycle import UpcycleOptions, group_codes, shifted_rows, upcycle, with_noise
from convert.verify.routing import compare
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.checkpoints.reader import Checkpoint, units
from nemoe_jax.model.moe import MoE
from nemoe_jax.spec import schema
from tests.support.compiled import forward, normal
from tests.support.configs import DENSE, MIXTRAL, NEKOMIND, write_tokenizer

SOURCES = {
    "float32": MIXTRAL,
    "bfloat16": MIXTRAL.replace(dtype="bfloat16"),
    "nekomind": NEKOMIND,
    "nekomind, softmax over all": NEKOMIND.replace(normalize_top_k=False),
}
TOKENS = np.random.default_rng(1).integers(0, 72, (8, 9))


def save(directory, config):
    params = schema.initialize(config, jax.random.key(3))
    norms = params["blocks"]["moe"]["ffn_norm"]
    params["blocks"]["moe"]["ffn_norm"] = norms + normal(jax.random.key(4), norms.shape, 0.3)
    pretrained.save_pretrained(directory, config, params)
    return directory


def router_of(directory, layer=1):
    """The rows (E, D), in float64, of a Mixtral layer."""
    return np.asarray(Checkpoint(directory).view(f"model.layers.{layer}.block_sparse_moe.gate.weight"), np.float64)


def router_parameters(config):
    return config.experts * config.hidden * config.runs[-1].layers


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens):
    output = forward(config, params, tokens)
    return output.logits, output.routing.load_E


def logits_and_load(directory):
    config, params = pretrained.load_pretrained(directory, dtype=jnp.float32)
    logits, load_LE = run(config.replace(dtype="float32"), params, TOKENS)
    return np.asarray(logits), np.asarray(load_LE)


@pytest.mark.parametrize("source", ["float32", "bfloat16", "nekomind, softmax over all"])
@pytest.mark.parametrize("mode", ["wide", "split"])
def test_the_logits_and_the_choices_are_the_same(tmp_path, mode, source):
    config = SOURCES[source]
    directory = save(tmp_path / "1", config)
    expected, load_LE = logits_and_load(directory)
    for factor in (2, 4) if source == "float32" else (2,):  # 16 -> 32 -> 64
        before, directory = directory, tmp_path / str(factor)
        upcycle(before, directory, UpcycleOptions(experts=factor * config.experts, mode=mode))
        logits, load = logits_and_load(directory)
        np.testing.assert_allclose(logits, expected, atol=1e-5 * expected.std())
        np.testing.assert_allclose(load.reshape(len(load), factor, -1), np.repeat(load_LE[:, None], factor, 1) / factor)
        result = Checkpoint(directory).config
        assert (result.experts, result.top_k) == (factor * config.experts, factor * config.top_k)
        assert result.expert_ffn * (factor if mode == "split" else 1) == config.expert_ffn
        if mode == "split":  # parameters in all and of a token: the rows of the router are more
            added = np.subtract(schema.count(result), schema.count(config))
            np.testing.assert_array_equal(added, (factor - 1) * router_parameters(config))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_copies_choose_what_the_source_chooses_but_for_a_strip(tmp_path, factor):
    """Against NumPy in float64, on the router's own inputs: normal, times the norm weight."""
    upcycle(save(tmp_path / "1", MIXTRAL), tmp_path / "2", UpcycleOptions(experts=16 * factor, mode="copies"))
    source = Checkpoint(tmp_path / "1")
    norm = np.asarray(source.view("model.layers.1.post_attention_layernorm.weight"), np.float64)
    x_TD = np.random.default_rng(0).normal(size=(20_000, 24)) * norm
    one_TE = x_TD @ router_of(tmp_path / "1").T
    many_TE = np.float32(x_TD) @ np.float32(router_of(tmp_path / "2")).T
    chosen_TC, copies_TC = (np.argsort(-logits, axis=1, kind="stable")[:, :4] for logits in (one_TE, many_TE))
    mixed_T = np.ptp(copies_TC // 16, axis=1) > 0
    other_T = (np.sort(copies_TC % 16) != np.sort(chosen_TC)).any(1)
    assert 0 < mixed_T.mean() < 2e-3  # between groups: not avoidable
    assert (other_T & ~mixed_T).mean() < 1e-3  # near ties
    load_G = np.bincount(copies_TC.ravel() // 16) / copies_TC.size
    np.testing.assert_allclose(load_G, 1 / factor, atol=0.02)
    same_T = ~other_T & ~mixed_T
    weights_TC, copied_TC = (
        np.take_along_axis(logits, chosen, 1)[same_T] for logits, chosen in ((one_TE, chosen_TC), (many_TE, copies_TC))
    )
    weights_TC, copied_TC = (
        np.sort(np.exp(top - top.max(1, keepdims=True)), axis=1) for top in (weights_TC, copied_TC)
    )
    np.testing.assert_allclose(
        copied_TC / copied_TC.sum(1)[:, None], weights_TC / weights_TC.sum(1)[:, None], atol=2e-3
    )


def test_copies_of_groups_that_share_a_row_have_no_strip():
    """Four experts of one row are chosen together, so that any lead of their copies leaves them together."""
    random = np.random.default_rng(0)
    router_ED = np.repeat(random.normal(size=(4, 24)).astype(np.float32) / 100, 4, axis=0)
    many_ED, _ = shifted_rows(router_ED, np.ones(24, np.float32), 2, MIXTRAL, 1024.0)
    x_TD = random.normal(size=(20_000, 24)).astype(np.float32)
    chosen_TC = np.argsort(-(x_TD @ many_ED.T), axis=1, kind="stable")[:, :4]
    group_T = np.argmax(x_TD.astype(np.float64) @ router_ED[::4].T.astype(np.float64), axis=1)
    assert (np.sort(chosen_TC % 16) != 4 * group_T[:, None] + np.arange(4)).any(1).mean() < 1e-4
    np.testing.assert_allclose(np.bincount(chosen_TC.ravel() // 16) / chosen_TC.size, 0.5, atol=0.02)


@pytest.mark.parametrize("source", ["float32", "nekomind", "nekomind, softmax over all"])
def test_copies_of_a_chain_give_the_same_logits(tmp_path, source):
    config = SOURCES[source]
    save(tmp_path / "1", config)
    for before, after in itertools.pairwise([1, 2, 4][: 3 if source == "float32" else 2]):
        upcycle(
            tmp_path / str(before), tmp_path / str(after), UpcycleOptions(experts=after * config.experts, mode="copies")
        )
        found = compare(Checkpoint(tmp_path / "1"), Checkpoint(tmp_path / str(after)), [TOKENS[:, :5]])
        assert found.changed_choices == 0  # these tokens lie in no strip
        assert found.max_difference < 3e-3
        assert found.least_used_group > 0
    result = Checkpoint(tmp_path / str(after)).config
    assert (result.top_k, result.expert_ffn) == (config.top_k, config.expert_ffn)
    assert schema.count(result)[1] - schema.count(config)[1] == (after - 1) * router_parameters(config)


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_copies_hold_the_source_bit_for_bit_but_on_the_shifted_channels(tmp_path, source):
    config = SOURCES[source]
    directory = save(tmp_path / "1", config)
    manifest = upcycle(directory, tmp_path / "2", UpcycleOptions(experts=32, mode="copies", shift=256.0))
    one, two = Checkpoint(directory), Checkpoint(tmp_path / "2")
    for ref in itertools.chain.from_iterable(units(config)):
        if "experts" not in ref.spec.produced:
            expert = ref.place[1] if "experts" in ref.spec.stacked else None
            for copy in (0, 16) if expert is not None else (0,):
                key = ref.key.replace(f"experts.{expert}.", f"experts.{(expert or 0) + copy}.")
                np.testing.assert_array_equal(two.view(key), one.view(ref.key))
    rows, copied = router_of(directory), router_of(tmp_path / "2").reshape(2, 16, -1)
    figures = manifest.layers[1]
    shift = np.zeros(24)
    shift[figures["channels"]] = figures["shift"]
    assert np.count_nonzero(shift) == 1
    rounding = shift * (2**-8 if source == "bfloat16" else 2**-23)
    for sign, group in zip((1, -1), copied, strict=True):
        np.testing.assert_allclose((group - rows - sign * shift) / (rounding + (shift == 0)), 0, atol=1)
        np.testing.assert_array_equal(group[:, shift == 0], rows[:, shift == 0])


@pytest.mark.parametrize("mode", ["copies", "wide"])
def test_copies_learn_different_things(tmp_path, mode):
    upcycle(save(tmp_path / "1", MIXTRAL), tmp_path / "2", UpcycleOptions(experts=32, mode=mode))
    config, params = pretrained.load_pretrained(tmp_path / "2")
    graph = nnx.split(MoE(config, schema.declare(config)["blocks"]["moe"]["ffn"]))[0]
    weights = jax.tree.map(lambda array: array[0], params["blocks"]["moe"]["ffn"])
    x_BTD = normal(jax.random.key(0), (1, 200, 24))

    @jax.jit
    def gradient(weights):
        return jax.grad(lambda weights: jnp.mean(nnx.merge(graph, weights)(x_BTD)[0] ** 2))(weights)["up"]

    first, second = np.asarray(gradient(weights)).reshape(2, 16, -1)
    apart_E = np.linalg.norm(first - second, axis=-1) / np.linalg.norm(first, axis=-1)
    assert (apart_E > (0.5 if mode == "copies" else 1e-3)).all()
    chosen_TC = np.asarray(nnx.merge(graph, weights).route(x_BTD)[1][0])
    groups = [set(row // 16) for row in chosen_TC]
    assert all(len(group) == (1 if mode == "copies" else 2) for group in groups)  # of copies, each token meets one


@pytest.mark.parametrize("mode", ["copies", "wide", "split"])
def test_transformers_opens_the_result_and_agrees(tmp_path, mode):
    pytest.importorskip("torch")
    from convert.verify.logits import torch_logits

    config = MIXTRAL.replace(expert_ffn=16)  # torch wants rows of 16 bytes
    upcycle(save(tmp_path / "1", config), tmp_path / "2", UpcycleOptions(experts=32, mode=mode))
    expected, got = torch_logits(tmp_path / "1", TOKENS[:, :5]), torch_logits(tmp_path / "2", TOKENS[:, :5])
    np.testing.assert_allclose(got, expected, atol=(1e-3 if mode == "copies" else 1e-5) * expected.std())


@pytest.mark.parametrize("copies", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_sums_to_zero_exactly(dtype, copies):
    down = np.random.default_rng(0).normal(size=(24, 12)).astype(jnp.dtype(dtype))
    noisy = np.array(with_noise(down, copies, 0.01, np.random.default_rng(1)), np.float64)
    np.testing.assert_array_equal(noisy.sum(0), copies * down.astype(np.float64))
    std = (noisy[-1] - noisy[-2]).std() / 2
    assert 0.002 < std < 0.02


@pytest.mark.parametrize(("groups", "channels"), [(2, 1), (3, 3), (4, 2), (6, 4), (8, 3)])
def test_every_group_leads_as_often(groups, channels):
    codes = group_codes(groups)
    assert codes.shape == (groups, channels)
    leads = np.argmax(np.random.default_rng(0).normal(size=(20_000, channels)) @ codes.T, axis=1)
    np.testing.assert_allclose(np.bincount(leads, minlength=groups) / 20_000, 1 / groups, atol=0.01)


def test_the_command_reports_the_check_and_records_only_what_matters(tmp_path, capsys):
    save(tmp_path / "1", MIXTRAL)
    command = ["upcycle", str(tmp_path / "1"), str(tmp_path / "2"), "--experts", "32", "--check-tokens", "1", "--json"]
    assert cli.main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["experts"], figures["top_k"], figures["expert_ffn"]) == (32, 8, 12)
    assert figures["check_changed_choices"] == 0 and figures["check_max_difference"] < 1e-5
    assert figures["check_tokens"] == 8 * 96
    options = json.loads((tmp_path / "2" / "conversion.json").read_text())["options"]
    assert options == {"command": "upcycle", "experts": 32, "mode": "wide", "shift": 0.0, "noise": 0.01, "seed": 0}


def test_the_check_on_text(tmp_path, capsys):
    save(tmp_path / "1", MIXTRAL)
    tokenizer = write_tokenizer(tmp_path / "1")
    numbers = np.random.default_rng(0).integers(0, 69, 97 * 8)
    (tmp_path / "text.txt").write_text(" ".join(f"word{number}" for number in numbers))
    command = ["upcycle", str(tmp_path / "1"), str(tmp_path / "2"), "--experts", "32", "--json"]
    assert cli.main([*command, "--check", str(tmp_path / "text.txt")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["check_tokens"] == 8 * 96 and figures["check_changed_choices"] == 0
    tokenizer.add_tokens(["word68word"])  # number 72: not in the model
    tokenizer.save(str(tmp_path / "1" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("word68word " * 97)
    command[2] = str(tmp_path / "3")
    assert cli.main([*command, "--check", str(tmp_path / "text.txt")]) == 2
    assert "gives token 72; the model's embedding has 72 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", "16"], "--experts: expected 2, 3, … times the 16 experts of"),
        (["--experts", "8"], "got 8"),
        (["--experts", "40"], "got 40"),
        (["--experts", "0"], "got 0"),
        (["--experts", "80", "--mode", "split"], "experts of 12 neurons do not divide into 5 parts"),
        (["--experts", "32", "--noise", "-1"], "--noise: expected 0 or more, got -1.0"),
        (["--experts", "32", "--noise", "nan"], "--noise: expected 0 or more, got nan"),
        (["--experts", "32", "--check", "nowhere.txt"], "no tokenizer (expected tekken.json, tokenizer.json or"),
        (["--experts", "32", "--check", __file__], "tokenizer"),
        (["--experts", "464", "--mode", "copies"], "29 groups want 29 channels"),
    ],
)
def test_bad_options_are_one_line_and_exit_status_2(tmp_path, capsys, flags, message):
    save(tmp_path / "1", MIXTRAL)
    assert cli.main(["upcycle", str(tmp_path / "1"), str(tmp_path / "2"), *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_dense_model_is_refused(tmp_path, capsys):
    pretrained.save_pretrained(tmp_path / "1", DENSE, schema.initialize(DENSE, jax.random.key(0)))
    assert cli.main(["upcycle", str(tmp_path / "1"), str(tmp_path / "2"), "--experts", "32"]) == 2
    assert "a dense model; upcycle wants an MoE model" in capsys.readouterr().err

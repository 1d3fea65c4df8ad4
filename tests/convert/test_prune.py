"""Pruned mixtures against loops over tokens in NumPy, and against the source with the dropped experts' logits at −∞."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import cli
from convert.experts import prune
from convert.experts.outputs import expert_products
from convert.experts.prune import PruneOptions, choose_experts, subset_errors, use_of_experts
from convert.streaming import MANIFEST, ConversionSettings, Writer
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.model.moe import MoE
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec import schema
from tests.support.configs import DENSE, MIXTRAL, NEKOMIND, write_tokenizer

MIXTURES = {
    "mixtral": MIXTRAL,
    "nekomind": NEKOMIND,
    "nekomind, softmax over all": NEKOMIND.replace(normalize_top_k=False),
}
KEPT = {16: 14, 8: 5}  # experts -> how many are kept


@pytest.fixture(params=MIXTURES.values(), ids=MIXTURES.keys())
def mixture(request):
    return request.param


def save(directory, config):
    """A model directory of random weights with a tokenizer of whole words."""
    pretrained.save_pretrained(directory, config, schema.initialize(config, jax.random.key(3)))
    write_tokenizer(directory)
    return directory


@pytest.fixture
def directory(tmp_path, mixture):
    return save(tmp_path / "source", mixture)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"word{number}" for number in np.random.default_rng(0).integers(0, 69, 97 * 8)))
    return path


@pytest.fixture
def layer(mixture):
    """One layer's FFN and its input (B, T, D), with what a loop over tokens makes of it."""
    random = np.random.default_rng(5)
    specs = schema.declare(mixture)["blocks"]["moe"]["ffn"]
    names = ("router", "gate", "up", "down")
    ffn = {name: random.normal(size=specs[name].shape[1:]).astype(np.float32) for name in names}
    return ffn, random.normal(size=(8, 7, mixture.hidden)).astype(np.float32)


def loop(config, ffn, x_BTD, members):
    """The experts' summed output (tokens, D) with only the members there, routing weight × norm and choices (E,)."""
    summed, use, choices = [], np.zeros(config.experts), np.zeros(config.experts)
    for x in x_BTD.reshape(-1, config.hidden).astype(np.float64):
        logits = x @ ffn["router"]
        share = {expert: np.exp(logits[expert] - logits.max()) for expert in members}
        chosen = sorted(members, key=lambda expert: -logits[expert])[: config.top_k]
        total = sum(share[expert] for expert in (chosen if config.normalize_top_k else members))
        y = np.zeros(config.hidden)
        for expert in chosen:
            gate, up = x @ ffn["gate"][expert], x @ ffn["up"][expert]
            output = share[expert] / total * ((gate / (1 + np.exp(-gate)) * up) @ ffn["down"][expert])
            y += output
            use[expert] += np.linalg.norm(output)
            choices[expert] += 1
        summed.append(y)
    return np.array(summed), use, choices


def test_scores_and_errors_are_those_of_a_loop_over_tokens(mixture, layer):
    ffn, x_BTD = layer
    logits_TE, gram_TEE = expert_products(ffn, x_BTD)
    whole, use, choices = loop(mixture, ffn, x_BTD, range(mixture.experts))
    got_use, got_choices = use_of_experts(mixture, logits_TE, gram_TEE)
    np.testing.assert_allclose(got_use, use, rtol=1e-4)
    np.testing.assert_array_equal(got_choices, choices)
    subsets = np.array([*itertools.combinations(range(mixture.experts), KEPT[mixture.experts])])
    errors = subset_errors(mixture, logits_TE, gram_TEE, subsets)
    some = np.unique(np.append(np.arange(0, len(subsets), 7), errors.argmin()))
    expected = [np.sum((loop(mixture, ffn, x_BTD, members)[0] - whole) ** 2) for members in subsets[some]]
    np.testing.assert_allclose(errors[some], np.array(expected) / np.sum(whole**2), rtol=1e-3, atol=1e-5)


def test_of_equal_logits_the_first_experts_are_chosen_as_the_model_does():
    config = MIXTRAL
    logits_TE = jnp.array([[0.0] * 16, [1.0, 0.0] * 8])
    chosen = prune.routing(config, logits_TE)[1]
    expected = jax.lax.top_k(logits_TE, config.top_k)[1]
    assert (
        [np.flatnonzero(row).tolist() for row in chosen] == np.sort(expected).tolist() == [[0, 1, 2, 3], [0, 2, 4, 6]]
    )


@pytest.mark.parametrize("method", ["reap", "exhaustive", "frequency"])
def test_the_choice_of_each_method(tmp_path, method):
    source = Checkpoint(save(tmp_path / "source", MIXTRAL))
    batches = list(np.random.default_rng(2).integers(0, 72, (2, 8, 9)))
    choices = choose_experts(source, batches, 14, method)
    assert list(choices) == [0, 1, 2]
    exact = choose_experts(source, batches, 14, "exhaustive")
    for number, figures in choices.items():
        scores, kept = np.array(figures["scores"]), figures["kept"]
        assert kept == sorted(set(kept)) and len(kept) == 14
        dropped = np.delete(scores, kept)
        np.testing.assert_allclose(figures["dropped_share"], dropped.sum() / scores.sum(), rtol=1e-5)
        if method != "exhaustive":
            assert dropped.max() <= scores[kept].min()
        assert 0 < exact[number]["layer_error"] <= figures["layer_error"] * (1 + 1e-6) < 1
    if method == "frequency":
        assert abs(sum(figures["scores"]) - 1) < 1e-6


def test_an_expert_that_no_token_chose_scores_nothing(tmp_path):
    directory = save(tmp_path / "source", MIXTRAL)
    config, params = pretrained.load_pretrained(directory)
    router = params["blocks"]["moe"]["ffn"]["router"]
    params["blocks"]["moe"]["ffn"]["router"] = router.at[:, :, 4:].set(0).at[:, :, :4].multiply(0)  # ties: 0, 1, 2, 3
    pretrained.save_pretrained(tmp_path / "idle", config, params)
    batches = list(np.random.default_rng(2).integers(0, 72, (2, 8, 9)))
    figures = choose_experts(Checkpoint(tmp_path / "idle"), batches, 4)[1]
    assert figures["kept"] == [0, 1, 2, 3]
    assert figures["scores"][4:] == [0] * 12 and figures["dropped_share"] == figures["layer_error"] == 0


def test_the_result_is_the_source_with_the_dropped_experts_masked(directory, mixture, text, tmp_path, monkeypatch):
    kept = KEPT[mixture.experts]
    command = ["prune-experts", str(directory), str(tmp_path / "pruned"), "--calibration-tokens", "700"]
    assert cli.main([*command, "--experts", str(kept), "--calibration", str(text)]) == 0
    config, params = pretrained.load_pretrained(tmp_path / "pruned")
    assert config == mixture.replace(experts=kept)
    tokens = np.random.default_rng(1).integers(0, 72, (2, 9))
    got = jax.jit(lambda params: forward(config, params, tokens).logits)(params)

    manifest = json.loads((tmp_path / "pruned" / MANIFEST).read_text())
    rows = [figures for figures in manifest["layers"] if "kept" in figures]
    assert [row["layer"] for row in rows] == list(range(mixture.dense_layers, mixture.layers))
    _, source = pretrained.load_pretrained(directory)
    router_LDE = np.array(source["blocks"]["moe"]["ffn"]["router"])
    for router_DE, row in zip(router_LDE, rows, strict=True):
        router_DE[:, np.setdiff1d(np.arange(mixture.experts), row["kept"])] = np.nan
    source["blocks"]["moe"]["ffn"]["router"] = jnp.asarray(router_LDE)
    project = MoE.project

    def masked(self, name, *arguments):
        y = project(self, name, *arguments)
        return jnp.where(jnp.isnan(y), -jnp.inf, y) if name == "router" else y

    monkeypatch.setattr(MoE, "project", masked)
    expected = jax.jit(lambda params: forward(mixture, params, tokens).logits)(source)
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.std(expected)))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A model as a carve leaves it: experts g, g + 4, g + 8 and g + 12 share a router row, so top-4 is one group."""
    params = schema.initialize(MIXTRAL, jax.random.key(3))
    params["blocks"]["moe"]["ffn"]["router"] = jnp.tile(params["blocks"]["moe"]["ffn"]["router"][..., :4], 4)
    directory = tmp_path_factory.mktemp("tied") / "source"
    pretrained.save_pretrained(directory, MIXTRAL, params)
    write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("method", ["reap", "exhaustive", "frequency"])
def test_experts_that_share_a_router_row_stay_or_go_together(tied, text, tmp_path, method):
    """A group is one expert with all its neurons, at a quarter of `down`, of which a token chooses one."""
    prune.prune(tied, tmp_path / "pruned", PruneOptions(8, (str(text),), method, calibration_tokens=700))
    rows = json.loads((tmp_path / "pruned" / MANIFEST).read_text())["layers"]
    _, source = pretrained.load_pretrained(tied)
    ffn = source["blocks"]["moe"]["ffn"]
    parts, by_score = {name: [] for name in ffn}, []
    for layer, row in enumerate(rows):
        scores_GC = np.array(row["scores"]).reshape(4, 4).T
        best = sorted({expert % 4 for expert in row["kept"]})
        assert row["kept"] == [expert for expert in range(16) if expert % 4 in best] and len(best) == 2
        assert method == "exhaustive" or set(best) == set(np.argsort(-scores_GC.sum(1))[:2])
        by_score.append(sorted(np.argsort(-np.array(row["scores"]))[:8].tolist()) == row["kept"])
        experts_GC = np.arange(16).reshape(4, 4).T[best]
        parts["router"].append(ffn["router"][layer][:, best])
        for name in ("gate", "up"):
            parts[name].append(jnp.concatenate(jnp.moveaxis(ffn[name][layer][experts_GC], 1, 0), axis=-1))
        parts["down"].append(jnp.concatenate(jnp.moveaxis(ffn["down"][layer][experts_GC], 1, 0), axis=1) / 4)
    assert method != "reap" or not all(by_score)  # single experts' scores would have broken groups up
    source["blocks"]["moe"]["ffn"] = {name: jnp.stack(arrays) for name, arrays in parts.items()}
    tokens = np.random.default_rng(1).integers(0, 72, (2, 9))
    expected = forward(MIXTRAL.replace(experts=2, top_k=1, expert_ffn=48), source, tokens).logits
    config, params = pretrained.load_pretrained(tmp_path / "pruned")
    np.testing.assert_allclose(forward(config, params, tokens).logits, expected, atol=1e-5 * float(jnp.std(expected)))


def test_a_choice_that_breaks_groups_up_is_made_anew_of_its_scores(tied, tmp_path):
    scores = [9.0, 4, 3, 2, 0, 4, 3, 2, 0, 4, 3, 2, 0, 4, 3, 2]
    for kept, expected in ((list(range(8)), {1, 2}), ([*range(2, 16, 4), *range(3, 16, 4)], {2, 3})):
        rows = [{"layer": layer, "scores": scores, "kept": kept} for layer in range(3)]
        (tmp_path / "earlier.json").write_text(json.dumps({"layers": rows}))
        options = PruneOptions(8, choices=str(tmp_path / "earlier.json"))
        manifest = prune.prune(tied, tmp_path / str(min(expected)), options)
        assert [{expert % 4 for expert in row["kept"]} for row in manifest.layers] == [expected] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", "10"], "--experts: expected a multiple of 4, got 10"),
        (["--experts", "8", "--merge"], "--merge: expected experts that are chosen one by one"),
    ],
)
def test_groups_are_not_broken_up(tied, text, tmp_path, capsys, flags, message):
    command = ["prune-experts", str(tied), str(tmp_path / "pruned"), "--calibration", str(text), *flags]
    assert cli.main(command) == 2
    groups = "model.layers.0.block_sparse_moe.gate.weight: groups of 4 experts share a row and are chosen together"
    assert capsys.readouterr().err == f"error: {tied}: {groups}; {message}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [MIXTRAL, NEKOMIND], ids=["mixtral", "nekomind"])
def test_transformers_opens_the_result(config, text, tmp_path):
    pytest.importorskip("torch")
    options = PruneOptions(KEPT[config.experts], (str(text),), calibration_tokens=700)
    prune.prune(save(tmp_path / "source", config), tmp_path / "pruned", options)
    assert cli.main(["verify", str(tmp_path / "pruned"), "--tokens", "9"]) == 0


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(text, tmp_path, monkeypatch):
    directory = save(tmp_path / "source", MIXTRAL)
    options = PruneOptions(14, (str(text),), calibration_tokens=700)
    expected = prune.prune(directory, tmp_path / "whole", options, ConversionSettings(shard_bytes=1))
    written = []

    def write(self, unit, *rest):
        if unit == 2 and not written.count(2):
            written.append(unit)
            raise KeyboardInterrupt
        written.append(unit)
        return original(self, unit, *rest)

    original = Writer.write
    monkeypatch.setattr(Writer, "write", write)
    with pytest.raises(KeyboardInterrupt):
        prune.prune(directory, tmp_path / "pruned", options, ConversionSettings(shard_bytes=1))
    assert not (tmp_path / "pruned").exists()
    first = len(written)
    assert prune.prune(directory, tmp_path / "pruned", options, ConversionSettings(shard_bytes=1)) == expected
    assert 2 in written[first:] and len(written) == 6  # nothing was written twice
    files = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert len(files) == 5
    for path in files:
        assert (tmp_path / "pruned" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("way", ["calibration", "choices"])
def test_an_interrupted_run_does_not_go_on_with_other_choices(way, text, tmp_path, monkeypatch):
    """The file keeps its name; what is in it changes in the meantime."""
    directory = save(tmp_path / "source", MIXTRAL)
    options = PruneOptions(10, **{way: (str(tmp_path / "input"),) if way == "calibration" else str(tmp_path / "input")})
    options = dataclasses.replace(options, calibration_tokens=700)
    one, other = ("sorted", "as drawn") if way == "calibration" else (0, 1)

    def give(content):
        if way == "calibration":
            words = text.read_text().split()
            (tmp_path / "input").write_text(" ".join(words if content == "as drawn" else sorted(words)))
        else:
            rows = np.random.default_rng(content).random((3, 16)).tolist()
            layers = [{"layer": layer, "scores": row} for layer, row in enumerate(rows)]
            (tmp_path / "input").write_text(json.dumps({"layers": layers}))

    def kept(manifest):
        return [figures["kept"] for figures in manifest.layers]

    give(other)
    expected = prune.prune(directory, tmp_path / "whole", options)
    give(one)
    assert kept(prune.prune(directory, tmp_path / "first", options)) != kept(expected)
    original, written = Writer.write, []

    def write(self, unit, *rest):
        if unit == 3 and 3 not in written:
            written.append(unit)
            raise KeyboardInterrupt
        original(self, unit, *rest)
        written.append(unit)

    monkeypatch.setattr(Writer, "write", write)
    with pytest.raises(KeyboardInterrupt):
        prune.prune(directory, tmp_path / "pruned", options)
    assert len(written) > 1  # some of it is finished
    written[:] = [3]
    give(other)
    assert prune.prune(directory, tmp_path / "pruned", options) == expected
    assert sorted(written[1:]) == [0, 1, 2, 3, 4]
    assert (tmp_path / "pruned/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_dry_run_writes_nothing(text, tmp_path, capsys):
    directory = save(tmp_path / "source", MIXTRAL)
    command = ["prune-experts", str(directory), str(tmp_path / "pruned"), "--calibration-tokens", "700", "--json"]
    assert cli.main([*command, "--dry-run", "--experts", "8", "--calibration", str(text)]) == 0
    assert json.loads(capsys.readouterr().out)["would_write"] == str(tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", "3"], "--experts: expected 4 (top-k) to 15 of the 16 experts of "),
        (["--experts", "16"], "--experts: expected 4 (top-k) to 15 of the 16 experts of "),
        (["--experts", "8", "--calibration", "nowhere.txt"], "nowhere.txt: no text there"),
        (["--experts", "8", "--calibration-tokens", "1000000"], "expected more than 1,000,"),
        (["--experts", "8", "--calibration-tokens", "0"], "--calibration-tokens: expected a positive number, got 0"),
    ],
)
def test_bad_options_are_one_line_and_exit_status_2(text, tmp_path, capsys, flags, message):
    directory = save(tmp_path / "source", MIXTRAL)
    command = ["prune-experts", str(directory), str(tmp_path / "pruned"), "--calibration", str(text)]
    assert cli.main([*command, *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_too_many_subsets_and_dense_models_are_refused():
    options = PruneOptions(32, ("text.txt",), "exhaustive")
    with pytest.raises(UserError, match=r"64 experts have 1,832,624,140,942,590,534 subsets of 32.*use --method reap"):
        prune.refuse_misfits([[expert] for expert in range(64)], options, "router")
    prune.refuse_misfits([[expert] for expert in range(16)], PruneOptions(8, ("text.txt",), "exhaustive"), "router")
    with pytest.raises(UserError, match="model: a dense model; prune-experts wants an MoE model"):
        prune.pruned_config(DENSE, options, "model")


def test_scores_of_an_earlier_run_are_taken_instead_of_text(tmp_path):
    pretrained.save_pretrained(tmp_path / "model", MIXTRAL, schema.initialize(MIXTRAL, jax.random.key(0)))
    scores = np.random.default_rng(0).random((3, 16)).round(3)
    rows = [{"layer": layer, "scores": row.tolist()} for layer, row in enumerate(scores)]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"layers": rows}))
    manifest = prune.prune(tmp_path / "model", tmp_path / "pruned", PruneOptions(8, choices=str(earlier)))
    assert [row["kept"] for row in manifest.layers] == [sorted(np.argsort(-row)[:8].tolist()) for row in scores]
    rows[1]["kept"] = [0, 2, 3, 5, 7, 11, 13, 15]  # as another method chose
    earlier.write_text(json.dumps({"layers": rows}))
    for experts, expected in ((8, rows[1]["kept"]), (7, sorted(np.argsort(-scores[1])[:7].tolist()))):
        manifest = prune.prune(tmp_path / "model", tmp_path / str(experts), PruneOptions(experts, choices=str(earlier)))
        assert manifest.layers[1]["kept"] == expected
    for bad, message in (({}, "layer 0's experts, got None"), ({"layers": [{"layer": 0, "scores": [1]}]}, "got 1")):
        earlier.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            prune.prune(tmp_path / "model", tmp_path / "again", PruneOptions(8, choices=str(earlier)))
    with pytest.raises(UserError, match="either --calibration text or --choices"):
        prune.prune(tmp_path / "model", tmp_path / "again", PruneOptions(8))
    assert not (tmp_path / "again").exists()


def test_choices_of_other_weights_are_refused(tmp_path):
    save(tmp_path / "model", MIXTRAL)
    rows = [{"layer": layer, "scores": [float(expert) for expert in range(16)]} for layer in range(3)]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"layers": rows}))
    prune.prune(tmp_path / "model", tmp_path / "first", PruneOptions(8, choices=str(earlier)))
    first = tmp_path / "first" / "conversion.json"
    prune.prune(tmp_path / "model", tmp_path / "second", PruneOptions(8, choices=str(first)))
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1  # in the last tensor
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"run on other weights \(model\.safetensors differs\)"):
        prune.prune(tmp_path / "model", tmp_path / "third", PruneOptions(8, choices=str(first)))
    assert not (tmp_path / "third").exists()


def test_copies_of_an_expert_are_merged_into_it(text, tmp_path, capsys):
    """In other orders of their neurons, with other scales of `down`, and so with scores in proportion to them."""
    config, scale = MIXTRAL, np.array([4, 2, 1, 0.5], np.float32)
    params = schema.initialize(config, jax.random.key(3))
    ffn = {name: np.array(array) for name, array in params["blocks"]["moe"]["ffn"].items()}
    first, random = {name: array[:, :4].copy() for name, array in ffn.items()}, np.random.default_rng(4)
    for layer, new in itertools.product(range(3), range(16)):
        order = random.permutation(config.expert_ffn)
        for name in ("gate", "up"):
            ffn[name][layer, new] = first[name][layer, new % 4][:, order]
        ffn["down"][layer, new] = first["down"][layer, new % 4][order] * scale[new // 4]
        near = 1 + 1e-6 * (new // 4)  # rows that were the same would make a group of the copies
        ffn["router"][layer, :, new] = near * ffn["router"][layer, :, new % 4]
    params["blocks"]["moe"]["ffn"] = {name: jnp.asarray(array) for name, array in ffn.items()}
    pretrained.save_pretrained(tmp_path / "copies", config, params)
    write_tokenizer(tmp_path / "copies")
    command = ["prune-experts", str(tmp_path / "copies"), str(tmp_path / "merged"), "--experts", "4", "--merge"]
    assert cli.main([*command, "--calibration", str(text), "--calibration-tokens", "700"]) == 0
    for row in json.loads((tmp_path / "merged" / MANIFEST).read_text())["layers"]:
        assert [sorted(group) for group in row["groups"]] == [[n, n + 4, n + 8, n + 12] for n in range(4)]
    got = pretrained.load_pretrained(tmp_path / "merged")[1]["blocks"]["moe"]["ffn"]
    for name, factor in (("gate", 1), ("up", 1), ("down", (scale**2).sum() / scale.sum())):
        for ours, expected in zip(got[name].reshape(12, -1), first[name].reshape(12, -1), strict=True):
            np.testing.assert_allclose(np.sort(ours), np.sort(factor * expected), rtol=1e-4, atol=1e-6)
    capsys.readouterr()
    assert cli.main([*command, "--calibration", str(text), "--method", "frequency"]) == 2
    assert "--merge: expected --calibration and --method reap with it" in capsys.readouterr().err
